"The runner, on a toy study of three stages that take a second each"
import fcntl, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat
import pytest
from conftest import ROOT, sh

def notebook(path, parameters, body):
    nb = nbformat.v4.new_notebook(metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    head = nbformat.v4.new_code_cell('import json, time\nfrom pathlib import Path\nfrom elbowsynth.core import progress, root')
    nb.cells = [head, nbformat.v4.new_code_cell(parameters, metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(body)]
    nbformat.write(nb, path)

WRITE = "o = root()/run/out\no.mkdir(parents=True, exist_ok=True)\n"

@pytest.fixture
def toy(tmp_path):
    "A checkout with three stages: a writes films, b reads them slowly and can go on, c reads b"
    for n in ('workflow', 'elbowsynth'): shutil.copytree(ROOT/n, tmp_path/n, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'nbs').mkdir()
    (tmp_path/'params').mkdir()
    (tmp_path/'params'/'demo.yaml').write_text('all: {n: 4}')
    notebook(tmp_path/'nbs'/'01_a.ipynb', 'run: str = "_runs/x"  # Run\nout: str = "raw"  # Writes\nn: int = 99  # Films\nseed: int = 0  # Seed', WRITE+"(o/'films.json').write_text(json.dumps(list(range(n))))")
    notebook(tmp_path/'nbs'/'02_b.ipynb', 'run: str = "_runs/x"  # Run\ndata: str = "raw"  # Reads\nout: str = "model"  # Writes\nsleep: float = 0.0  # Seconds a step\nfail: bool = False  # Fail',
             WRITE+"done = len(list(o.glob('step*')))\n(o/'starts').write_text((o/'starts').read_text()+'s' if (o/'starts').exists() else 's')\n"
             "if fail: raise ValueError('the model would not learn')\nfor i in progress(range(done, 6), 'Steps', every=.2):\n    time.sleep(sleep)\n    (o/f'step{i}').touch()")
    notebook(tmp_path/'nbs'/'03_c.ipynb', 'run: str = "_runs/x"  # Run\nmodels: list = ["model"]  # Reads\nout: str = "report"  # Writes', WRITE+"(o/'steps').write_text(str(len(list((root()/run/models[0]).glob('step*')))))")
    return tmp_path

def study(toy, *args, check=True, **env): return sh(sys.executable, '-m', 'elbowsynth.run', 'study', *args, cwd=toy, check=check, PYTHONPATH=str(toy), **env)
def stages_run(done): return re.findall(r'stage (\d of \d): (\w+) done', done.stderr)

def test_runs_in_order_and_not_twice(toy):
    (toy/'home').mkdir()
    first = study(toy, HOME=str(toy/'home'))
    assert list((toy/'home').rglob('*'))==[]                                              # nothing of it goes into the user's home
    assert [s for _, s in stages_run(first)]==['a', 'b', 'c'] and '1 of 3' in first.stderr
    run = toy/'_runs'/'demo'
    assert json.loads((run/'raw'/'films.json').read_text())==[0, 1, 2, 3]                # the profile's value, not the notebook's 99
    assert (run/'report'/'steps').read_text()=='6'
    assert {p.name for p in (run/'notebooks').iterdir()}=={'01_a.ipynb', '02_b.ipynb', '03_c.ipynb'} and (run/'logs'/'b.log').exists()
    assert json.loads((run/'raw'/'stage.json').read_text())['values']=={'run': '_runs/demo', 'out': 'raw', 'n': 4, 'seed': 0}
    assert stages_run(study(toy))==[]                                                   # all is up to date
    assert [s for _, s in stages_run(study(toy, '--set', 'seed=1'))]==['a', 'b', 'c']     # what changed, and what reads it
    assert [s for _, s in stages_run(study(toy, '--set', 'seed=1', '--set', 'sleep=0.01'))]==['b', 'c']
    note = json.loads((toy/'nbs'/'02_b.ipynb').read_text())
    note['cells'][2]['source'] = '# a comment\n'+''.join(note['cells'][2]['source'])
    (toy/'nbs'/'02_b.ipynb').write_text(json.dumps(note))
    assert stages_run(study(toy, '--set', 'seed=1', '--set', 'sleep=0.01'))==[]             # a comment makes nothing stale
    outside = {p.name for p in toy.iterdir()}-{'workflow', 'elbowsynth', 'settings.ini', 'nbs', 'params', 'home'}
    assert outside=={'_runs'}, outside

def test_a_users_folder_takes_the_place_of_the_first_stage(toy):
    (toy/'my films').mkdir()
    assert [s for _, s in stages_run(study(toy, '--data', toy/'my films'))]==['b', 'c']
    assert (toy/'_runs'/'demo-my films'/'report'/'steps').exists() and not (toy/'_runs'/'demo-my films'/'raw').exists()
    (toy/'other'/'my films').mkdir(parents=True)
    done = study(toy, '--data', toy/'other'/'my films', check=False)
    assert done.returncode!=0 and 'give this one another folder with RUN=NAME' in done.stderr                # two folders of one name
    (toy/'my films'/'new.png').touch()
    assert [s for _, s in stages_run(study(toy, '--data', toy/'my films'))]==['b', 'c']   # the folder changed

@pytest.mark.parametrize('args, word', [(['--set', 'sed=1'], "'sed=1' names no parameter of any stage"), (['--profile', 'big'], "no profile 'big': params holds demo"),
                                        (['--set', 'n=many seed=1'], "a.n is 'many', while it wants int"), (['--data', 'nowhere'], 'DATA=nowhere: no such folder'),
                                        (['--run', '../out'], 'the name of a folder below _runs'), (['--target', 'd'], 'no stage is called d; there are a, b, c')])
def test_what_does_not_fit_is_refused_in_one_line(toy, args, word):
    done = study(toy, *args, check=False)
    assert done.returncode!=0 and word in done.stderr and 'Traceback' not in done.stderr and not (toy/'_runs'/'demo'/'raw').exists()

def test_a_misspelt_profile_is_refused(toy):
    (toy/'params'/'demo.yaml').write_text('all: {m: 4}\nb: {slep: 1}')
    done = study(toy, check=False)
    assert done.returncode!=0 and "b has no parameter 'slep'; no stage has a parameter 'm'" in done.stderr

def test_a_failed_stage_names_notebook_cell_and_log(toy):
    done = study(toy, '--set', 'fail=true', check=False)
    assert done.returncode!=0
    for word in ('b FAILED in nbs/02_b.ipynb, cell 3: `o = root()/run/out`', 'ValueError: the model would not learn', '_runs/demo/logs/b.log', '_runs/demo/notebooks/02_b.ipynb', 'not finished: b, c'):
        assert word in done.stderr, done.stderr
    assert 'the model would not learn' in (toy/'_runs'/'demo'/'logs'/'b.log').read_text()
    assert [s for _, s in stages_run(study(toy))]==['b', 'c']                             # mended, it goes on

def test_one_study_at_a_time_in_a_folder(toy):
    (toy/'_runs'/'demo').mkdir(parents=True)
    with (toy/'_runs'/'demo'/'.lock').open('w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = study(toy, check=False)
    assert done.returncode!=0 and 'another study is working in' in done.stderr and not (toy/'_runs'/'demo'/'raw').exists()

def wait_for(condition, seconds=60):
    end = time.time()+seconds
    while not condition():
        assert time.time()<end, 'waited too long'
        time.sleep(.1)

def alive(toy):
    "Processes of the toy's study: those that work in its folder, or have it in their command line"
    def mine(p):
        try: return str(toy) in (p/'cmdline').read_text().replace('\0', ' ') or str(toy) in os.readlink(p/'cwd')
        except OSError: return False                                # gone, or a zombie
    return [p.name for p in Path('/proc').glob('[0-9]*') if mine(p)]

@pytest.mark.parametrize('whom', ['study', 'everything'])
def test_killed_in_the_middle_it_goes_on(toy, whom):
    env = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_')} | {'PYTHONPATH': str(toy)}
    args = ['--set', 'sleep=1.0']
    p = subprocess.Popen([sys.executable, '-m', 'elbowsynth.run', 'study', *args], cwd=toy, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    model = toy/'_runs'/'demo'/'model'
    wait_for(lambda: (model/'step1').exists())
    (os.kill if whom=='study' else os.killpg)(p.pid, signal.SIGKILL)
    p.wait()
    wait_for(lambda: not alive(toy))                                                    # no stage outlives its study
    assert not (model/'step5').exists()
    done = study(toy, *args)
    assert [s for _, s in stages_run(done)]==['b', 'c'] and (model/'starts').read_text()=='ss'
    assert (toy/'_runs'/'demo'/'report'/'steps').read_text()=='6'
    assert re.search(r'stage 2 of 3: b   Steps: \d of \d, 0:\d\d so far, about 0:\d\d left', done.stderr)   # a long loop tells how far it is
