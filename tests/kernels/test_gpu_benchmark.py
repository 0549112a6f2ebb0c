"The benchmark of the GPU kernels, tried on a CPU: what it times is right, and it says which bounds were missed"
import importlib
import json
from pathlib import Path

import pytest
from benchmarks import gpu as benchmark


@pytest.mark.slow
def test_every_case_runs(tmp_path, capsys):
    cases = benchmark.main(['--device', 'cpu', '--out', str(tmp_path/'figures.json')])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert len(cases) == len(benchmark.CASES) == len(table)-1
    assert json.loads((tmp_path/'figures.json').read_text())['cases'] == json.loads(json.dumps(cases))
    for case in cases:
        assert case['seconds'].keys() >= {'ours', 'torch', 'copy'} and 'mean nothing' not in case['case']
        for error in ('loss_error', 'gradient_error'): assert case[error]['ours'] < (1e-5 if case['dtype'] == 'float32' else 1e-2), case


def test_bounds():
    case = dict(reach=.5, seconds=dict(ours=.4, torch=1.), peak_bytes=dict(ours=10**6, torch=3*10**6), logits_bytes=10**6)
    assert benchmark.missed(case) == []
    assert benchmark.missed(case | dict(seconds=dict(ours=1.2, torch=1., Liger=1.1))) == ['t > 0.5', 'slower than torch', 'slower than Liger']
    assert benchmark.missed(case | dict(peak_bytes=dict(ours=4*10**6, torch=3*10**6))) == ['mem > 1.05', 'more memory than torch']
    small = case | dict(logits_bytes=640, peak_bytes=dict(ours=2**16, torch=2**17))
    assert benchmark.missed(small) == []


def test_a_method_that_fails_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs): raise RuntimeError('no kernel image')
    monkeypatch.setattr(benchmark.timm.loss.SoftTargetCrossEntropy, 'forward', broken)
    case, = benchmark.main(['--device', 'cpu', '--only', 'fp32 dense 256', '--out', str(tmp_path/'figures.json')])
    assert case['failed'] == {'timm': 'RuntimeError: no kernel image'} and 'timm' not in case['seconds'] and case['seconds']['ours'] > 0
    assert 'fp32 dense 256×1000, timm left out: RuntimeError: no kernel image' in capsys.readouterr().out


def test_what_is_measured_is_written_before_the_next_case(tmp_path, monkeypatch):
    run = benchmark.run_case

    def second_breaks(name, *args):
        if 'bf16' in name: raise RuntimeError('out of memory')
        return run(name, *args)
    monkeypatch.setattr(benchmark, 'run_case', second_breaks)
    with pytest.raises(RuntimeError, match='out of memory'): benchmark.main(['--device', 'cpu', '--only', 'index 64', '--out', str(tmp_path/'figures.json')])
    assert [c['case'] for c in json.loads((tmp_path/'figures.json').read_text())['cases']] == ['fp32 index 64×10']


def test_a_name_that_no_case_has(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop: benchmark.main(['--device', 'cpu', '--only', 'fp8', '--out', str(tmp_path/'figures.json')])
    assert stop.value.code == 2 and "No case holds 'fp8': use a part of fp32 index 64×10" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize('script', ('gpu', 'gpu_learner'))
def test_no_figure_without_a_gpu(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(benchmark.__file__).parent)) # as where a script is started
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(SystemExit) as stop: importlib.import_module(script).main([])
    assert stop.value.code == 1 and 'nothing was measured' in capsys.readouterr().err
