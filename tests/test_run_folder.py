"A folder that one run claims: whole files, the lock between processes, and what is refused"
import json
import subprocess
import sys

import pytest

from fastai_smooth.run_folder import InUse, RunFolder, atomic, conflicts, read_config, used, write_text


def test_files_are_whole_or_as_before(tmp_path):
    write_text(tmp_path/'a.txt', 'naïve')
    assert (tmp_path/'a.txt').read_bytes().decode('utf-8') == 'naïve'
    with pytest.raises(KeyboardInterrupt):
        with atomic(tmp_path/'a.txt') as part:
            part.write_text('half')
            raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError):  # nothing was written
        with atomic(tmp_path/'a.txt'): pass
    assert (tmp_path/'a.txt').read_text('utf-8') == 'naïve' and [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_what_counts_as_used(tmp_path):
    assert not used(tmp_path/'none') and not used(tmp_path)
    (tmp_path/'.lock').touch()
    (tmp_path/'predictions').mkdir()
    (tmp_path/'runs.csv.part').write_text('method,')
    assert not used(tmp_path)
    (tmp_path/'predictions'/'ce-0.npz').touch()
    assert used(tmp_path)


def test_conflicts_name_both_values():
    noted = dict(eps=.1, data='digits', settings=dict(lr=1, bs=2), more=3)
    assert conflicts(noted, dict(eps=.1, settings=dict(bs=2))) == []
    assert conflicts(noted, dict(eps=.2, size=None, settings=dict(lr=2), new=4)) == ['eps=0.1 (here 0.2)', 'lr=1 (here 2)', 'new=None (here 4)']


@pytest.mark.parametrize('held, resume, words', [
    ('notes', False, 'holds another run'), ('notes', True, 'config.json'), ('damaged', True, 'config.json'), ('list', True, 'config.json'),
    ('same', False, 'holds this run.*resume it'), ('same', True, None), ('other', False, 'holds another run: name another'),
    ('other', True, r'eps=0.2 \(here 0.1\): resume it with the same'), ('file', True, 'is a file'), ('below', False, 'is a file'), ('nothing', True, None)])
def test_what_a_folder_may_hold(held, resume, words, tmp_path):
    out, mine = tmp_path/'run', dict(eps=.1, methods=('ce', 'ls'))
    if held == 'file': out.write_text('mine')
    elif held == 'below':
        out.write_text('mine')
        out = out/'x'/'y'
    elif held != 'nothing':
        out.mkdir()
        text = dict(notes=None, damaged='{"eps": .1', list='[]', same=json.dumps(mine), other=json.dumps({**mine, 'eps': .2}))[held]
        (out/('notes.txt' if text is None else 'config.json')).write_text(text or 'mine')
    before = {p: p.read_text() for p in tmp_path.rglob('*') if p.is_file()}
    if words is None:
        with RunFolder(out, mine, resume).claim(): assert read_config(out) == dict(eps=.1, methods=['ce', 'ls'])
    else:
        with pytest.raises(ValueError, match=words): RunFolder(out, mine, resume)
        assert {p: p.read_text() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_what_is_known_later_is_compared_too(tmp_path):
    with RunFolder(tmp_path, dict(eps=.1)).claim(dict(eps=.1, fingerprint='a')): pass
    with pytest.raises(ValueError, match=r"fingerprint='a' \(here 'b'\)"):
        with RunFolder(tmp_path, dict(eps=.1), resume=True).claim(dict(eps=.1, fingerprint='b')): pass
    assert read_config(tmp_path)['fingerprint'] == 'a'


def test_the_second_of_two_that_found_it_empty(tmp_path):
    first, second, third = (RunFolder(tmp_path/'run', dict(eps=eps)) for eps in (.1, .2, .1))
    with pytest.raises(RuntimeError):  # an error leaves the folder free, and says what it holds
        with first.claim(): raise RuntimeError
    with pytest.raises(InUse, match='another run by now'):
        with second.claim(): pass
    with third.claim(): pass
    assert read_config(tmp_path/'run') == dict(eps=.1)


@pytest.mark.processes
def test_the_lock_is_held_by_the_process(tmp_path):
    "Another process cannot claim it; when the owner is killed, it can"
    code = "import sys, time; from fastai_smooth.run_folder import RunFolder\n"
    code += "with RunFolder(sys.argv[1], {}).claim(): print('mine', flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == 'mine\n'
    with pytest.raises(InUse, match='in use by another run'):
        with RunFolder(tmp_path, {}, resume=True).claim(): pass
    owner.kill()
    owner.communicate()
    with RunFolder(tmp_path, {}, resume=True).claim(): pass
