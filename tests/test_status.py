"What `elbowsynth status` and `elbowsynth verify` say of a real run: while it runs, after a kill, when it is done, and when something was changed"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from test_runner import make_toy, append_to_cell, study
from conftest import sh

def command(toy, what, run='demo'):
    return sh(sys.executable, '-m', 'elbowsynth.run', what, run, cwd=toy, check=False, PYTHONPATH=str(toy))

def wait_for(condition, seconds=120):
    for _ in range(10*seconds):
        if condition(): return
        time.sleep(.1)
    pytest.fail('waited in vain')

@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "A study whose second stage was seen at work and then killed with everything around it; what status said of both moments"
    toy = make_toy(tmp_path_factory.mktemp('status')/'checkout')
    env = os.environ | {'PYTHONPATH': str(toy)}
    arguments = [sys.executable, '-m', 'elbowsynth.run', 'study', '--set', 'sleep=2']
    process = subprocess.Popen(arguments, cwd=toy, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    run = toy/'_runs'/'demo'
    wait_for((run/'model'/'step1').exists)
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*') if '.snakemake' not in p.parts and 'logs' not in p.parts and 'model' not in p.parts}
    running = command(toy, 'status')
    after = {p: p.stat().st_mtime_ns for p in before}
    record = json.loads((run/'logs'/'b.json').read_text())
    os.kill(record['pid'], signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not Path(f'/proc/{record["pid"]}').exists())
    return toy, running, before==after, command(toy, 'status')

def test_status_of_a_running_study(killed):
    _, running, is_unchanged, _ = killed
    lines = running.stdout.splitlines()
    assert lines[0].endswith('_runs/demo: 1 of 3 jobs done') and running.returncode==0, running.stdout+running.stderr
    assert lines[1].split()[:2]==['a', 'done'] and lines[2].split()[:2]==['b', 'running'] and lines[-1].split()==['c', 'waiting']
    assert 'of 6, about' in running.stdout and 'logs/b.log' in running.stdout
    assert lines[2].split()[2].startswith('0:'), 'a job that has run for seconds'
    assert is_unchanged, 'status has written into the run'

def test_a_killed_study_has_died(killed):
    _, _, _, died = killed
    assert [line.split()[1] for line in died.stdout.splitlines()[2:3]]==['died'] and died.returncode==1, died.stdout
    assert '1 failed or died: b; the same make study goes on' in died.stdout

@pytest.fixture(scope='module')
def done(killed):
    toy = killed[0]
    study(toy)
    return toy

def changed(done, tmp_path, change):
    "What verify says after `change`, in a copy of the checkout; the run must be found where it now is"
    toy = tmp_path/'checkout'
    shutil.copytree(done, toy, ignore=shutil.ignore_patterns('.snakemake'))
    change(toy)
    return command(toy, 'verify')

def test_a_finished_run_matches_also_where_it_was_copied(done, tmp_path):
    assert command(done, 'status').stdout.splitlines()[0].endswith('3 of 3 jobs done')
    verified = changed(done, tmp_path, lambda toy: None)
    assert (verified.returncode, verified.stdout)==(0, 'all 3 results match their parameters, code, inputs and files\n'), verified.stderr

def edit_json(path, edit):
    contents = json.loads(path.read_text())
    edit(contents)
    path.write_text(json.dumps(contents))

def set_n(plan): plan['jobs'][0]['values']['n'] = 5
def forget(made): made.pop('outputs'); made.pop('inputs')

CHANGES = {
    'file': (lambda toy: (toy/'_runs/demo/model/step1').write_text('x'), ['b: its files are not those that were written']),
    'missing file': (lambda toy: (toy/'_runs/demo/raw/images.json').unlink(), ['a: its files are not those that were written']),
    'parameter': (lambda toy: edit_json(toy/'_runs/demo/plan.json', set_n), ['a: n was 4, is 5 in plan.json']),
    'code': (lambda toy: append_to_cell(toy/'nbs'/'2_models'/'02_b.ipynb', '\nprint(1)'), ['b: its code has changed']),
    'input': (lambda toy: edit_json(toy/'_runs/demo/raw/stage.json', lambda made: made.update(outputs='0'*12)),
              ['a: its files are not those that were written', 'b: raw was made again']),
    'unfinished': (lambda toy: (toy/'_runs/demo/report/stage.json').unlink(), ['c: is not finished']),
    'earlier version': (lambda toy: edit_json(toy/'_runs/demo/report/stage.json', forget), ['c: has no hashes: it was made by an earlier version'])}

@pytest.mark.parametrize('change', CHANGES)
def test_each_change_is_found_and_named(change, done, tmp_path):
    edit, expected = CHANGES[change]
    verified = changed(done, tmp_path, edit)
    lines = verified.stdout.splitlines()
    assert verified.returncode==1 and lines[:-1]==expected, verified.stdout+verified.stderr
    assert f'{len(expected)} of 3 results do not match; fix: start the study again' in lines[-1]

@pytest.mark.parametrize('what', ['status', 'verify'])
def test_what_is_no_run_is_one_line(what, tmp_path):
    toy = make_toy(tmp_path/'checkout')
    absent = command(toy, what, 'nothing')
    assert absent.returncode==1 and absent.stderr.startswith('elbowsynth: nothing is no run: there is no plan.json') and absent.stderr.count('\n')==1
    (toy/'_runs'/'cut').mkdir(parents=True)
    (toy/'_runs'/'cut'/'plan.json').write_text('{"jobs": [')
    damaged = command(toy, what, 'cut')
    assert damaged.returncode==1 and 'plan.json is damaged' in damaged.stderr and damaged.stderr.count('\n')==1
