"The command: its options are the parameters of functions, mistakes are one line, and usage needs neither torch nor fastai"
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastai_smooth import __version__
from fastai_smooth.arguments import EMBEDDED, Arguments, check_used
from fastai_smooth.cli import COMMANDS, _parser, main, numbers, quiet, setting
from fastai_smooth.compare import Comparison
from fastai_smooth.data import SOURCES, read_source
from fastai_smooth.train import recipes, training


@pytest.mark.parametrize('args, words', [
    (['train', 'resnet'], 'there are pets'), (['train', 'digits', '--arch', 'resnet18'], "no setting 'arch'"), (['train', 'finetune'], 'no data of its own'),
    (['train', 'finetune', 'nowhere'], 'nowhere is not a folder'), (['train', 'digits', '--set', 'epochs'], 'NAME=VALUE'),
    (['train', 'digits', '--set', 'colour=3'], "no setting 'colour'"), (['train', 'digits', '--epochs', '0'], 'epochs must be above 0'),
    (['train', 'digits', '--set', 'bs=abc'], 'bs must be a number'), (['train', 'digits', '--set', 'calibrate=no'], 'True or False'),
    (['train', 'digits', '--epochs', '1', '--set', 'epochs=2'], 'epochs is given twice'), (['train', 'digits', '--set', 'out=x'], 'out is given twice'),
    (['train', 'digits', '--epochs', 'x'], '--epochs'), (['train'], 'RECIPE'), (['train', 'digits', '--ignore', '255'], "no setting 'ignore'"),
    (['train', 'finetune', '.', '--pretrained', 'perhaps'], 'yes nor no'), (['train', 'digits', '--out', '/proc/no/such'], '/proc/no'),
    (['train', 'digits', '--resume'], '--out'), (['calibrate', 'a.pkl', 'b'], '--out'), (['calibrate', 'a.pkl', 'b', '--out', 'c.pkl'], 'There is no a.pkl'),
    (['list', 'resnet'], 'there are pets'), (['compare', '--seed', '3'], 'unrecognized arguments: --seed'), (['compare', '--epoch', '3'], '--epoch'),
    (['compare', '--eps', 'much'], '--eps'), (['compare', '--resume'], '--out'), (['fit'], 'invalid choice')])
def test_mistakes_are_one_line_and_write_nothing(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try: code = main(args)
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_the_command_alone_prints_its_usage(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith('usage: fastai-smooth') and all(name in out for name in COMMANDS)


def test_list(capsys):
    assert main(['list']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.strip().splitlines()] == list(recipes)
    assert main(['list', 'a3']) == 0 and 'magnitude' in capsys.readouterr().out


def test_options_of_compare_are_those_of_a_comparison():
    "Names and defaults, so that nothing which Python can say is missing from the command, and the other way round"
    has = vars(_parser().parse_args(['compare']))
    assert (has.pop('command'), has.pop('threads')) == ('compare', None)
    fields = {k: f.default for k, f in Comparison.__dataclass_fields__.items() if f.init and k not in ('rows', 'rates')}
    assert has == fields


def test_help_names_all_data_sets(capsys):
    with pytest.raises(SystemExit): main(['compare', '--help'])
    out = capsys.readouterr().out
    assert all(name in out for name in SOURCES) and '--valid-pct' in out and '(default: 0.2)' in out


@pytest.mark.parametrize('word', ['--valid-pct', '--valid_pct', '--valid_pct=.3', '--valid-pct=.3'])
def test_hyphens_and_underscores(word):
    words = [word] if '=' in word else [word, '.3']
    for command in (['compare'], ['train', 'digits']): assert _parser().parse_args([*command, *words]).valid_pct == .3


def test_every_setting_is_an_option_of_its_type():
    words = 'train segmentation x --ignore 255 --kernel-size 5 --sigma 2 --pretrained no --delimiter , --layers 20,10 --skip-broken'
    args = _parser().parse_args(words.split())
    assert (args.recipe, args.data, args.ignore, args.kernel_size, args.sigma, args.pretrained) == ('segmentation', 'x', 255, 5, 2., False)
    assert (args.delimiter, args.layers, args.skip_broken) == (',', (20, 10), True)
    for r in recipes.values(): assert set(r.settings) <= set(vars(args))


def test_values():
    assert numbers('.1') == .1 and numbers('0,.2') == [0., .2]
    assert setting('freeze-epochs=2') == ('freeze_epochs', 2) and setting('arch=resnet18') == ('arch', 'resnet18')
    assert setting('delimiter= ') == ('delimiter', ' ')


@pytest.mark.parametrize('name', [n for n in EMBEDDED if n != 'pets']) # which is downloaded
def test_what_is_known_of_embedded_sets_without_loading_them(name):
    source = read_source(name)
    assert EMBEDDED[name] == (source.kind, source.several, source.split is not None) and set(EMBEDDED) == set(SOURCES)


@pytest.mark.parametrize('args, words', [
    (['mnist'], "Unknown data set 'mnist': use one of digits"), (['--eps', '2'], 'eps must lie in [0, 1], but got 2.0'), (['--eps', '.1,-1'], 'got -1.0'),
    (['--noise', '1'], 'noise must lie in [0, 1), but got 1.0'), (['--methods', 'ce,magic'], "Unknown method 'magic'"),
    (['--methods', 'ls@2'], "in 'ls@2'"), (['--methods', 'ce,ls,ls@.1'], 'named twice in ce,ls,ls@.1'),
    (['docstrings', '--methods', 'ce,mixup'], 'does not fit texts'), (['--methods', 'ce,spatial'], 'does not fit images'),
    (['multi_digits', '--methods', 'prior'], 'exclusive classes'), (['multi_digits', '--methods', 'ls', '--noise', '.2'], 'noise puts'),
    (['multi_digits', '--valid-pct', '.3'], 'says which are for validation'),
    (['iris', '--size', '32'], 'iris holds rows'), (['--ignore', '255'], '--ignore is for masks'), (['--methods', 'ce,votes'], 'needs votes'),
    (['--methods', 'ce,mixup', '--eps', '.3'], 'is for methods that smooth'), (['--methods', 'ce,ls@.1', '--eps', '.2,.3'], 'is for methods that smooth'),
    (['--methods', 'ce~.1', '--noise', '.3'], 'name no label noise of their own'), (['--pairs', '4:9'], 'say how much'),
    (['--pairs=-1:2', '--noise', '.2'], 'pairs must be class numbers'), (['iris', '--eps', '.2,.2'], 'named twice in ce,ls@0.2,ls@0.2'),
    (['multi_digits', '--noise', '.2'], 'noise puts'), (['--methods', 'ls@.1', '--eps', '.2,.3'], '--eps 0.2,0.3 is for'),
    (['--seeds', '0'], 'seeds must be at least 1'),
    (['--seed0', '-1'], 'seed0 must be at least 0'), (['--pairs', '4', '--noise', '.2'], 'pairs must be class numbers'),
    (['--pairs', '1:2,4:4', '--noise', '.2'], 'a class with another one'), (['--weights', 'none.pth'], '--weights none.pth is no file'),
    (['--delimiter', ','], '--delimiter is for a CSV'), (['--labels', 'a,b'], '--labels is for a CSV'), (['--out', __file__], 'is a file'),
    (['--out', str(Path(__file__).parent)], 'holds another run, without a readable config.json'),
    (['--valid-pct', '1'], 'valid_pct must lie between 0 and 1'), (['--lr', '0'], 'lr must be above 0'), (['--threads', '0'], '--threads must be at least 1')])
def test_compare_refuses_at_once(args, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('fastai_smooth.compare.Comparison', None) # nobody asks for it
    assert main(['compare', *args]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize('eps, noise, pairs', [([.2, .3], 0., None), (.1, [.2, .4], '1:2'), ([.2, .3], [.2, .4], None), (.3, .2, '0:1')])
def test_what_a_report_says_repeats_the_comparison(eps, noise, pairs):
    comparison = Comparison('iris', ('ce', 'ls'), eps=eps, noise=noise, pairs=pairs, epochs=1, seeds=1)
    args = vars(_parser().parse_args(['compare', *comparison.arguments()]))
    asked = Arguments(**{k: v for k, v in args.items() if k not in ('command', 'threads')})
    check_used(asked)
    assert [m.key for m in asked.asked(asked.methods)] == [m.key for m in comparison.method_of.values()]


def test_names_may_come_in_any_form_and_strengths_that_are_written_alike_are_refused():
    for methods in ('ls', ['ls'], (m for m in ('ls',)), np.array(['ls'])): assert Arguments('iris', methods).methods == ('ls',)
    assert Arguments(eps=np.float32(.5), noise=np.float64(.2)).eps_values == [.5]
    for wrong in (dict(eps=[.1234567, .1234568]), dict(eps=[.2, .2]), dict(methods=('ls', 'ls@.1'))):
        with pytest.raises(ValueError, match='named twice'): Arguments('iris', **wrong)


@pytest.mark.slow
def test_a_run_goes_on_with_methods_that_need_less(tmp_path, capsys):
    out = str(tmp_path/'run')
    assert main(['compare', 'iris', '--methods', 'ce,ls', '--eps', '.3', '--noise', '.2', '--epochs', '1', '--seeds', '1', '--bs', '16', '--out', out]) == 0
    assert main(['compare', '--out', out, '--resume', '--methods', 'ce,ls@.2']) == 0, "nobody typed --eps"
    assert main(['compare', 'iris', '--methods', 'ce,ls@.2', '--eps', '.3', '--out', out]) == 2 and '--eps 0.3 is for' in capsys.readouterr().err


@pytest.mark.slow
def test_stopped_and_gone_on(tmp_path, capsys, monkeypatch):
    "Ctrl-C says how to go on; the folder knows the arguments; another one is refused with both values"
    out = tmp_path/'a run'
    args = ['train', 'tabular', '--table', 'iris', '--layers', '10', '--epochs', '2', '--out', str(out)]
    def stopped(self): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(training._Training, 'finish', stopped)
        assert main(args) == 130
    said = capsys.readouterr()
    assert said.err.strip() == f"Stopped. Continue with: fastai-smooth train --out '{out}' --resume"
    assert 'iris' not in said.out.splitlines()[0] and '120 examples for training' in said.out and f'results in {out}' in said.out
    again = ['train', '--out', str(out), '--resume']
    assert main([*again, '--epochs', '3']) == 2 and 'epochs=2 (here 3)' in capsys.readouterr().err
    assert main(again) == 0
    assert json.loads((out/'summary.json').read_text())['settings']['layers'] == [10]
    assert main(['compare', '--out', str(out), '--resume']) == 2 and 'no run that this command can go on with' in capsys.readouterr().err
    assert main(['train', '--out', str(tmp_path/'none'), '--resume']) == 2


@pytest.mark.slow
def test_compare_goes_on_with_the_arguments_that_were_typed(tmp_path, capsys, monkeypatch):
    out = tmp_path/'run'
    def stopped(self): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Comparison, 'summary', stopped)
        assert main(['compare', 'iris', '--methods', 'ce,ls', '--eps', '.1,.3', '--seeds', '2', '--epochs', '1', '--bs', '16', '--out', str(out)]) == 130
    assert f'Continue with: fastai-smooth compare --out {out} --resume' in capsys.readouterr().err
    assert main(['compare', '--out', str(out), '--resume', '--epochs', '2']) == 2 and 'epochs' in capsys.readouterr().err
    assert main(['compare', '--out', str(out), '--resume']) == 0
    s = json.loads((out/'summary.json').read_text())
    assert set(s['methods']) == {'ce', 'ls@0.1', 'ls@0.3'} and s['seeds'] == 2 and s['data'] == 'iris'


def test_doctor(capsys):
    assert main(['doctor']) == 0
    out, err = capsys.readouterr()
    assert not err and all(words in out for words in (f'fastai_smooth {__version__}', 'torch ', 'fastai ', 'threads', 'cpu: cpu, smoothed cross entropy by'))


@pytest.mark.processes
@pytest.mark.parametrize('args, code, words', [
    (['--version'], 0, __version__), ([], 0, 'usage'), (['compare', '--help'], 0, '--seeds'), (['train', '--help'], 0, '--ignore'), (['list'], 0, 'finetune'),
    (['list', 'a1'], 0, 'Wightman'), (['train', 'digits', '--arch', 'x'], 2, "no setting 'arch'"), (['train', 'finetune', 'nowhere'], 2, 'nowhere'),
    (['compare', '--seed', '3'], 2, 'unrecognized'), (['compare', 'mnist'], 2, 'Unknown data set'),
    (['compare', '--methods', 'magic'], 2, 'Unknown method'), (['compare', '--methods', 'ls@2'], 2, 'eps must lie'),
    (['compare', 'docstrings', '--methods', 'mixup'], 2, 'does not fit'), (['compare', '--methods', 'ce,ce'], 2, 'named twice'),
    (['compare', '--out', __file__], 2, 'is a file'),
    (['train', 'digits', '--out', __file__], 2, 'is a file')])
def test_usage_and_refusals_import_neither_torch_nor_fastai(args, code, words):
    script = ("import sys, time; args = sys.argv[1:]; from fastai_smooth.cli import main\ntry: code = main(args)\nexcept SystemExit as e: code = e.code\n"
              "assert not {'torch', 'fastai', 'numpy', 'timm'} & set(sys.modules)\nassert '--version' not in args or time.process_time() < .5\nsys.exit(code)")
    done = subprocess.run([sys.executable, '-c', script, *args], capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout+done.stderr, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize('words, kind, shown', [
    ('`torch.jit.script` is deprecated', 'FutureWarning', False), ('The given NumPy array is not writable', 'UserWarning', False),
    ('the data', 'UserWarning', True)])
def test_processes_of_several_jobs_do_not_repeat_what_nobody_can_act_on(words, kind, shown, monkeypatch):
    monkeypatch.setenv('PYTHONWARNINGS', '')
    monkeypatch.delenv('PYTHONWARNINGS')
    quiet()
    done = subprocess.run([sys.executable, '-c', f'import warnings; warnings.warn({words!r}, {kind})'], capture_output=True, text=True)
    assert (words in done.stderr) == shown


@pytest.mark.processes
def test_what_an_encoding_does_not_know_stops_nothing():
    script = "from fastai_smooth import cli; cli.__version__ = 'ε = 0.1'; cli.main(['--version'])"
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert (done.returncode, done.stdout) == (0, '? = 0.1\n'), done.stderr
