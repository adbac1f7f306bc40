"The runner, on a toy study of three stages that take a second each"
import ast, errno, fcntl, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat
import pytest
import elbowsynth
import elbowsynth.run
from conftest import ROOT, sh
from elbowsynth.core import require_path
from elbowsynth.run import _workflow_command, _write_plan, environment, job_values, plan
from elbowsynth.staleness import code_hash, imported_modules
from elbowsynth.stages import StageFinished, notebook_profile, record_defaults, stages

def notebook(path, parameters, body):
    "Write a stage notebook"
    nb = nbformat.v4.new_notebook(metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    imports = nbformat.v4.new_code_cell('#| export\nimport json, time\nfrom pathlib import Path\nfrom elbowsynth.core import progress, root')
    call = f'from elbowsynth.stages import notebook_profile\nnotebook_profile({path.stem.split("_")[1]!r}, globals())'
    tagged = nbformat.v4.new_code_cell(parameters, metadata={'tags': ['parameters']})
    nb.cells = [imports, tagged, nbformat.v4.new_code_cell(call), nbformat.v4.new_code_cell(body)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)

OPEN_FOLDER = 'o = root()/run/out\no.mkdir(parents=True, exist_ok=True)\n'

A_PARAMETERS = """run: str = "_runs/x"  # Folder of the run
out: str = "raw"  # Output folder
n: int = 99  # Images
seed: int = 0  # Seed"""
A_BODY = OPEN_FOLDER+"(o/'images.json').write_text(json.dumps(list(range(n))))"

B_PARAMETERS = """run: str = "_runs/x"  # Folder of the run
data: str = "raw"  # Input folder
out: str = "model"  # Output folder
sleep: float = 0.0  # Seconds a step
fail: bool = False  # Whether to fail
options: dict = {}  # Any other field of elbowsynth.toy_settings.ToyConfig"""
B_BODY = OPEN_FOLDER+"""done = len(list(o.glob('step*')))
(o/'starts').write_text((o/'starts').read_text()+'s' if (o/'starts').exists() else 's')
if fail: raise ValueError('no model')
for i in progress(range(done, 6), 'Steps', log_every_s=.2):
    time.sleep(sleep)
    (o/f'step{i}').touch()
from elbowsynth.toy_settings import ToyConfig
(o/'config.json').write_text(json.dumps(vars(ToyConfig(sleep=sleep, **options))))"""

C_PARAMETERS = """run: str = "_runs/x"  # Folder of the run
models: list = ["model"]  # Input folders
out: str = "report"  # Output folder"""
C_BODY = OPEN_FOLDER+"(o/'steps').write_text(str(len(list((root()/run/models[0]).glob('step*')))))"

TOY_SETTINGS = """from dataclasses import dataclass
@dataclass(frozen=True)
class ToyConfig:
    sleep:float = 0.
    decay_rate:float = -.8
    optimizer:str = 'adafactor'
    betas:tuple = (.5, .9)
"""

def make_toy(top):
    "A checkout with three stages: a writes images, b reads them slowly and can resume, c reads b"
    for n in ('workflow', 'elbowsynth'): shutil.copytree(ROOT/n, top/n, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', top)
    (top/'elbowsynth'/'toy_settings.py').write_text(TOY_SETTINGS)
    (top/'params').mkdir()
    (top/'params'/'demo.yaml').write_text('all: {n: 4}')
    notebook(top/'nbs'/'1_data'/'01_a.ipynb', A_PARAMETERS, A_BODY)
    notebook(top/'nbs'/'2_models'/'02_b.ipynb', B_PARAMETERS, B_BODY)
    notebook(top/'nbs'/'0_report'/'03_c.ipynb', C_PARAMETERS, C_BODY)                            # its folder is listed first
    return top

@pytest.fixture
def toy(tmp_path):
    "The toy checkout in a folder whose name Snakemake, papermill and a shell would change if they could"
    return make_toy(tmp_path/'check {out} {0} $HOME')

@pytest.fixture
def plain_toy(tmp_path):
    "The toy checkout in an ordinary folder: Snakemake cannot list stale rules in one with braces"
    return make_toy(tmp_path/'checkout')

def study(toy, *args, check=True, **env): return sh(sys.executable, '-m', 'elbowsynth.run', 'study', *args, cwd=toy, check=check, PYTHONPATH=str(toy), **env)
def stages_run(done): return [name for _, name in re.findall(r'stage (\d of \d): (\w+) done', done.stderr)]

def would_run(toy, *settings):
    "Stage to the reason why Snakemake would run it for these settings: changed, or what it reads would run; nothing is run"
    folder, jobs = plan('demo', settings=settings)
    _write_plan(toy/folder, jobs, '', 2)
    command = _workflow_command(toy/folder, 2)
    done = subprocess.run([*command[:command.index('--quiet')], '--dry-run'], cwd=toy, env=environment(1), capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    reasons = re.findall(r'^rule (\w+):\n.*?reason: (Params have changed|Input files updated)', done.stdout+done.stderr, flags=re.M|re.S)
    return {rule: 'changed' if reason.startswith('Params') else 'reads' for rule, reason in reasons if rule!='all'}

def append_to_cell(path, text):
    "Change the last cell of a notebook"
    nb = json.loads(path.read_text())
    nb['cells'][-1]['source'] = ''.join(nb['cells'][-1]['source'])+text
    path.write_text(json.dumps(nb))

def test_runs_in_order_and_not_twice(plain_toy, monkeypatch):
    toy = plain_toy
    (toy/'home').mkdir()
    killed_here = toy/'_runs'/'demo'/'raw'/'.part-images.json'
    killed_here.parent.mkdir(parents=True)
    killed_here.touch()
    first = study(toy, HOME=str(toy/'home'))
    assert not killed_here.exists()                                                     # what a killed process has left
    assert list((toy/'home').rglob('*'))==[]                                            # nothing is written into the user's home
    assert stages_run(first)==['a', 'b', 'c'] and '1 of 3' in first.stderr
    run = toy/'_runs'/'demo'
    assert json.loads((run/'raw'/'images.json').read_text())==[0, 1, 2, 3]              # the profile's value, not the notebook's 99
    assert (run/'report'/'steps').read_text()=='6'
    assert {p.name for p in (run/'notebooks').iterdir()}=={'01_a.ipynb', '02_b.ipynb', '03_c.ipynb'} and (run/'logs'/'b.log').exists()
    written = json.loads((run/'raw'/'stage.json').read_text())
    assert written['values']=={'run': '_runs/demo', 'out': 'raw', 'n': 4, 'seed': 0}
    assert written['notebook']=='nbs/1_data/01_a.ipynb' and written['dependencies']==[] and len(written['code_hash'])==12
    assert stages_run(study(toy))==[]                                                   # all is up to date

    monkeypatch.chdir(toy)                                                              # what makes a stage run again
    monkeypatch.setattr(elbowsynth, '__path__', [*elbowsynth.__path__, str(toy/'elbowsynth')])
    b, c, settings = toy/'nbs'/'2_models'/'02_b.ipynb', toy/'nbs'/'0_report'/'03_c.ipynb', toy/'elbowsynth'/'toy_settings.py'
    append_to_cell(b, '\n# a comment')
    settings.write_text('"A docstring"\n# a comment\n'+settings.read_text())
    (toy/'elbowsynth'/'unused.py').write_text('x = 1')
    assert would_run(toy)=={}                                                           # not comments, not modules that no stage imports
    assert would_run(toy, 'decay_rate=-0.5')=={'b': 'changed', 'c': 'reads'}            # a value
    append_to_cell(c, '\nchanged = 1')
    assert would_run(toy)=={'c': 'changed'}                                             # the code of a cell
    settings.write_text(settings.read_text()+'\nchanged = 1\n')
    assert would_run(toy)=={'b': 'changed', 'c': 'reads'}                               # the code of a module
    written_outside = {p.name for p in toy.iterdir()}-{'workflow', 'elbowsynth', 'settings.ini', 'nbs', 'params', 'home'}
    assert written_outside=={'_runs'}, written_outside

@pytest.mark.long('four studies, 40 s')
def test_user_folder_replaces_the_first_stage(toy):
    name = 'my {data} images'                                                           # Snakemake and papermill have their own use for braces
    (toy/name).mkdir()
    assert stages_run(study(toy, '--data', toy/name))==['b', 'c']
    assert (toy/'_runs'/f'demo-{name}'/'report'/'steps').exists() and not (toy/'_runs'/f'demo-{name}'/'raw').exists()
    (toy/'other'/name).mkdir(parents=True)
    done = study(toy, '--data', toy/'other'/name, check=False)
    assert done.returncode!=0 and 'fix: choose another folder with RUN=NAME' in done.stderr              # two folders of one name
    (toy/name/'new.png').touch()
    assert stages_run(study(toy, '--data', toy/name))==['b', 'c']                       # the folder changed

@pytest.mark.parametrize('args, message', [
    (['--set', 'sed=1'], "'sed=1': no stage has a parameter 'sed'; did you mean 'seed'?"),
    (['--profile', 'big'], "unknown profile 'big'; params has demo"),
    (['--set', 'n=many seed=1'], "a.n: expected int (default 99), got 'many'"),
    (['--data', 'nowhere'], 'DATA=nowhere: no such folder'),
    (['--run', '../out'], 'expected the name of a folder below _runs'),
    (['--run', 'x'*300], 'has 300 bytes; expected at most 100; fix: choose a shorter name with RUN=NAME'),
    (['--set', 'n=[1'], "'n=[1': the value is no YAML"),
    (['--set', 'out=same'], "b.out: 'same' is the folder of the stage a, too"),
    (['--set', 'b.out="{x}"'], 'b.out: expected a name of letters'),
    (['--target', 'd'], 'no stage is called d; stages: a, b, c'),
    (['--set', 'b.decay_rte=1'], "stage b has no parameter 'decay_rte'"),
    (['--set', 'b.decay_rate=low'], "b.decay_rate: expected float (default -0.8), got 'low'"),
    (['--set', 'b.options={optimiser: adam}'], "b.options: unknown option 'optimiser' of elbowsynth.toy_settings.ToyConfig; did you mean 'optimizer'?"),
    (['--set', 'b.decay_rate=-0.7 b.options={decay_rate: -0.6}'], 'b.decay_rate is set twice: by its name and in options'),
    (['--set', 'b.options={sleep: 1}'], "b.options: 'sleep' is a parameter of the stage; fix: set b.sleep")])
def test_wrong_arguments_are_refused_in_one_line(toy, args, message):
    done = study(toy, *args, check=False)
    assert done.returncode!=0 and message in done.stderr and 'Traceback' not in done.stderr and not (toy/'_runs'/'demo'/'raw').exists(), done.stderr

def test_misspelled_profile_is_refused(toy):
    (toy/'params'/'demo.yaml').write_text('all: {m: 4}\nb: {slep: 1, decay_rte: 1}')
    done = study(toy, check=False)
    assert done.returncode!=0
    message = "no stage has a parameter 'm'; b has no parameter 'slep'; did you mean 'sleep'?; b has no parameter 'decay_rte'; did you mean 'decay_rate'?"
    assert message in done.stderr, done.stderr

@pytest.mark.parametrize('profile, message', [('all: {n: 4', 'demo.yaml is no YAML'), ('b: 3', 'demo.yaml: b: expected a dict, got 3')])
def test_a_faulty_profile_is_refused_in_one_line(toy, profile, message):
    (toy/'params'/'demo.yaml').write_text(profile)
    done = study(toy, check=False)
    assert done.returncode!=0 and message in done.stderr and 'Traceback' not in done.stderr

def test_a_folder_that_cannot_be_written_is_named_in_one_line(toy):
    (toy/'_runs').touch()
    done = study(toy, check=False)
    assert done.returncode!=0 and done.stderr.count('\n')==1 and '_runs' in done.stderr and 'fix: rename the file' in done.stderr, done.stderr

@pytest.mark.parametrize('number, fix', [(errno.EROFS, 'make the folder writable'), (errno.ENOSPC, 'free some space, then rerun'), (errno.EACCES, 'make it accessible'), (errno.ENAMETOOLONG, 'shorter name')])
def test_refusals_of_the_system_say_what_to_do(toy, monkeypatch, capsys, number, fix):
    def refuse(*args, **named): raise OSError(number, os.strerror(number), '_runs/demo')
    monkeypatch.setattr(elbowsynth.run, 'study', refuse)
    monkeypatch.setattr(sys, 'argv', ['elbowsynth', 'study'])
    with pytest.raises(SystemExit) as end: elbowsynth.run.main()
    assert str(end.value).startswith(f'elbowsynth: {os.strerror(number)} (_runs/demo); fix: ') and fix in str(end.value) and '\n' not in str(end.value)

def test_a_killed_stage_and_a_killed_kernel_are_explained(toy):
    "Each in its words: nobody has reported the first, papermill the second"
    kill = 'import os, signal, sys\nprint("last word", end="")\nsys.stdout.flush()\nos.kill({}, signal.SIGKILL)'
    notebook(toy/'nbs'/'1_data'/'01_a.ipynb', A_PARAMETERS, kill.format('os.getppid()'))
    notebook(toy/'nbs'/'1_data'/'04_d.ipynb', A_PARAMETERS.replace('"raw"', '"other"'), kill.format('os.getpid()'))
    done = study(toy, '--target', 'a', '--target', 'd', check=False)
    assert done.returncode!=0
    assert re.search(r'stage a .*: it was killed, by hand or by the system, often for lack of memory; log: .*/logs/a.log', done.stderr), done.stderr
    assert 'd FAILED in nbs/1_data/04_d.ipynb' in done.stderr and 'DeadKernelError: the process of the notebook was killed' in done.stderr
    assert 'stage d ' not in done.stderr.split('it was killed')[1] and 'not finished: a, d' in done.stderr

def test_the_last_words_of_snakemake_are_shown(toy):
    with (toy/'workflow'/'Snakefile').open('a') as f: f.write('\nraise ValueError("no such rule")\n')
    done = study(toy, check=False)
    assert done.returncode!=0 and 'Snakemake failed; its last words' in done.stderr and 'no such rule' in done.stderr
    assert (toy/'_runs'/'demo'/'logs'/'workflow.log').exists() and 'not finished: a, b, c' in done.stderr

def test_messages_name_notebooks_that_exist():
    "Each stage that the library names as the writer of a missing file is a notebook"
    names = {n for s in stages(ROOT/'nbs') for n in (s.name, s.defaults['out'])}
    calls = [n for p in (ROOT/'elbowsynth').rglob('*.py') for n in ast.walk(ast.parse(p.read_text()))
             if isinstance(n, ast.Call) and getattr(n.func, 'id', '')=='require_path']
    constants = [c.args[1].value for c in calls if isinstance(c.args[1], ast.Constant)]
    assert len(constants)>=4 and set(constants)<=names
    with pytest.raises(FileNotFoundError) as error: require_path(Path('nowhere'), 'figures')
    assert re.search(r'\((nbs/\S+)\)', str(error.value))[1]=='nbs/6_report/81_figures.ipynb'

def test_failed_stage_names_notebook_cell_and_log(toy):
    done = study(toy, '--set', 'fail=true', check=False)
    assert done.returncode!=0
    for text in ('b FAILED in nbs/2_models/02_b.ipynb, cell 4: `o = root()/run/out`', 'ValueError: no model', '_runs/demo/logs/b.log',
                 '_runs/demo/notebooks/02_b.ipynb', 'not finished: b, c'):
        assert text in done.stderr, done.stderr
    assert 'no model' in (toy/'_runs'/'demo'/'logs'/'b.log').read_text()
    assert stages_run(study(toy))==['b', 'c']                                           # without the error it resumes

@pytest.mark.long('waits for a lock, 10 s')
def test_one_study_at_a_time_in_a_folder(toy):
    (toy/'_runs'/'demo').mkdir(parents=True)
    with (toy/'_runs'/'demo'/'.lock').open('w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = study(toy, check=False)
    assert done.returncode!=0 and 'another study is running in' in done.stderr and not (toy/'_runs'/'demo'/'raw').exists()

# Stages in JupyterLab

def type_into(path, line):
    "Replace a line of a notebook's parameters cell, as JupyterLab saves what somebody types"
    nb = json.loads(path.read_text())
    cell = next(c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', []))
    name = line.split(':')[0]
    cell['source'] = '\n'.join(line if old.split(':')[0]==name else old for old in ''.join(cell['source']).split('\n'))
    path.write_text(json.dumps(nb))

@pytest.fixture
def lab(toy, monkeypatch):
    "The toy checkout as the kernel of a notebook sees it after `make lab`"
    for name in ('PROFILE', 'RUN', 'DATA', 'RUNNER'): monkeypatch.delenv(f'ELBOWSYNTH_{name}', raising=False)
    monkeypatch.setenv('JPY_SESSION_NAME', 'x')
    monkeypatch.chdir(toy/'nbs')
    monkeypatch.setattr(elbowsynth, '__path__', [*elbowsynth.__path__, str(toy/'elbowsynth')])       # for toy_settings
    record_defaults(toy/'nbs')
    return toy

def cell(source):
    "Variables that a parameters cell leaves"
    variables = {}
    exec(source, variables)
    return variables

def contents(folder): return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob('*') if p.is_file()}

def write_finished_stage(toy, values, out='raw'):
    "A stage as a study leaves it"
    folder = toy/'_runs'/'demo'
    (folder/out).mkdir(parents=True)
    (folder/out/'images.json').write_text('[0, 1, 2, 3]')
    (folder/out/'stage.json').write_text(json.dumps({'values': values}))
    (folder/'plan.json').write_text(json.dumps({'jobs': [{'out': out}], 'data_dir': ''}))
    return folder

def test_what_is_typed_in_jupyterlab_wins_and_is_shown(lab, capsys):
    typed = cell(A_PARAMETERS.replace('99', '7'))
    notebook_profile('a', typed)
    assert (typed['n'], typed['seed'], typed['run'])==(7, 0, '_runs/demo')              # the profile has n: 4
    shown = capsys.readouterr().out
    assert 'n = 7    set in this notebook, instead of 4 of make lab' in shown and "run = '_runs/demo'    make lab (profile demo)" in shown
    untouched = cell(A_PARAMETERS)
    notebook_profile('a', untouched)
    assert untouched['n']==4
    notebook_profile('a', untouched)                                                    # the cell is run a second time
    assert untouched['n']==4

def test_typed_options_and_those_of_the_profile_are_joined(lab):
    (lab/'params'/'demo.yaml').write_text('b: {decay_rate: -0.6, optimizer: adam}')
    typed = cell(B_PARAMETERS.replace('= {}', "= {'decay_rate': -.7}"))
    notebook_profile('b', typed)
    assert typed['options']=={'decay_rate': -.7, 'optimizer': 'adam'}

@pytest.mark.parametrize('line, message', [
    ('n: int = "many"', "a.n: expected int (default 99), got 'many'"), ('run: str = "mine"', "run = 'mine': expected a folder below _runs, such as")])
def test_wrong_typed_values_are_refused(lab, line, message):
    name, value = line.split(': ')[0], line.split('= ')[1]
    with pytest.raises(ValueError) as error: notebook_profile('a', cell(A_PARAMETERS) | {name: json.loads(value)})
    assert message in str(error.value) and not (lab/'_runs').exists() and not (lab/'mine').exists()

@pytest.mark.long('two studies, 12 s')
def test_a_typed_value_does_not_become_the_default_of_the_study(lab):
    before = plan('demo')
    type_into(lab/'nbs'/'1_data'/'01_a.ipynb', 'seed: int = 3  # Tried')
    type_into(lab/'nbs'/'2_models'/'02_b.ipynb', 'sleep: float = 0.5  # Tried')
    assert plan('demo')==before                                                         # values and code
    done = study(lab, '--target', 'a')
    assert json.loads((lab/'_runs'/'demo'/'raw'/'stage.json').read_text())['values']['seed']==0
    assert "01_a.ipynb: its parameters cell has seed = 3, the study uses 0, the committed default; to use yours, add SET='a.seed=3'" in done.stderr
    assert '02_b.ipynb: its parameters cell has sleep = 0.5' in done.stderr
    record_defaults(lab/'nbs')
    assert [j.values['seed'] for j in plan('demo')[1] if j.name=='a']==[3]              # after `make prepare`

def test_recorded_defaults_are_those_of_the_notebooks():
    assert all(s.edited=={} for s in stages(ROOT/'nbs')), 'fix: make prepare'
    recorded = json.loads((ROOT/'params'/'defaults.json').read_text())
    assert list(recorded)==[s.name for s in stages(ROOT/'nbs')]
    assert all(list(recorded[s.name])==list(s.defaults) for s in stages(ROOT/'nbs')), 'fix: make prepare'

def test_a_parameters_cell_that_cannot_be_read_is_named(lab):
    type_into(lab/'nbs'/'1_data'/'01_a.ipynb', 'n: int = 2*50')
    done = study(lab, check=False)
    assert done.returncode!=0 and '01_a.ipynb: `n: int = 2 * 50`' in done.stderr and 'fix: undo the edit' in done.stderr and 'Traceback' not in done.stderr

def test_a_partial_copy_of_a_run_is_refused(toy):
    "As after an interrupted copy: one stage has lost a file, another all of them; nothing is started"
    study(toy)
    whole, partial = toy/'_runs'/'demo', toy/'_runs'/'copy'
    shutil.copytree(whole, partial)
    (partial/'model'/'step3').unlink()
    (partial/'report'/'steps').unlink()
    before = contents(partial)
    done = study(toy, '--run', 'copy', check=False)
    assert done.returncode!=0 and 'Traceback' not in done.stderr
    assert 'copy is not complete, as after an interrupted copy: model has 7 files and had 8; report has 0 files and had 1; nothing was started; fix: ' in done.stderr
    assert {p: c for p, c in contents(partial).items() if p.name!='.lock'}=={p: c for p, c in before.items() if p.name!='.lock'}
    shutil.copytree(whole, partial, dirs_exist_ok=True)
    assert study(toy, '--run', 'copy').returncode==0

def test_a_run_of_other_data_is_not_written_into(lab):
    folder = write_finished_stage(lab, {'n': 4})
    before = contents(folder)
    (lab/'mine').mkdir()
    with pytest.raises(ValueError, match='demo holds the study of simulated radiographs, not of .*/mine; nothing was changed'):
        notebook_profile('b', cell(B_PARAMETERS) | {'data': str(lab/'mine')})
    assert contents(folder)==before
    notebook_profile('b', cell(B_PARAMETERS) | {'data': str(lab/'mine'), 'run': '_runs/mine'})
    done = study(lab, '--run', 'mine', check=False)                                     # the study knows what JupyterLab has started
    assert done.returncode!=0 and f'mine holds the study of {lab/"mine"}, not of simulated radiographs' in done.stderr

def test_make_lab_chooses_run_and_data(lab, monkeypatch):
    (lab/'my images').mkdir()
    monkeypatch.setenv('ELBOWSYNTH_DATA', 'my images')                                  # relative to the checkout
    of_b, of_a = cell(B_PARAMETERS), cell(A_PARAMETERS)
    for name, variables in (('b', of_b), ('a', of_a)): notebook_profile(name, variables)
    assert of_b['data']==str(lab/'my images') and of_b['run']==of_a['run']=='_runs/demo-my images'
    monkeypatch.setenv('ELBOWSYNTH_RUN', 'second')
    of_b = cell(B_PARAMETERS)
    notebook_profile('b', of_b)
    assert (of_b['run'], of_b['data'])==('_runs/second', str(lab/'my images'))
    monkeypatch.delenv('ELBOWSYNTH_DATA')
    of_b = cell(B_PARAMETERS)
    notebook_profile('b', of_b)
    assert of_b['data']==str(lab/'my images')                                           # a run brings its data
    monkeypatch.setenv('ELBOWSYNTH_DATA', 'nowhere')
    with pytest.raises(FileNotFoundError, match='DATA=.*nowhere: no such folder'): notebook_profile('b', cell(B_PARAMETERS))

@pytest.mark.parametrize('typed', [{}, {'n': 7}])
def test_a_finished_stage_in_jupyterlab_changes_nothing(lab, typed):
    folder = write_finished_stage(lab, {'run': '_runs/demo', 'out': 'raw', 'n': 4, 'seed': 0})
    before = contents(folder)
    with pytest.raises(StageFinished) as error: notebook_profile('a', cell(A_PARAMETERS) | typed)
    assert 'a is finished in _runs/demo/raw. Nothing was run or changed' in str(error.value)
    assert ('n=4 then, 7 here' in str(error.value))==bool(typed) and 'out = "raw_2"' in str(error.value)
    assert contents(folder)==before
    notebook_profile('a', cell(A_PARAMETERS) | typed | {'out': 'raw_2'})                # beside it
    assert {p.name for p in folder.iterdir()}=={'raw', 'plan.json'}

def test_a_running_study_is_not_disturbed_by_jupyterlab(lab):
    folder = write_finished_stage(lab, {'n': 4})
    before = contents(folder)
    with (folder/'.lock').open('w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match='a study is running in demo and writes its folder raw; nothing was changed'):
            notebook_profile('a', cell(A_PARAMETERS))
        notebook_profile('a', cell(A_PARAMETERS) | {'out': 'mine'})
    assert {p: c for p, c in contents(folder).items() if p.name!='.lock'}==before

def test_a_finished_notebook_run_as_a_whole_shows_its_results(lab):
    "In a kernel, as JupyterLab runs it: the results of the study appear, no traceback, and no cell below runs"
    folder = write_finished_stage(lab, {'run': '_runs/demo', 'out': 'raw', 'n': 4, 'seed': 0})
    path = lab/'nbs'/'1_data'/'01_a.ipynb'
    executed = nbformat.read(path, as_version=4)
    executed.cells[-1].outputs = [nbformat.v4.new_output('stream', text='four images'), nbformat.v4.new_output('display_data', {'text/plain': 'a figure'})]
    (folder/'notebooks').mkdir()
    nbformat.write(executed, folder/'notebooks'/'01_a.ipynb')
    before = contents(folder)
    nb = run_in_kernel(path, lab)
    error = nb.cells[2].outputs[-1]
    assert error.ename=='StageFinished' and len(error.traceback)==1 and 'above are the results of that run' in error.traceback[0]
    shown = json.dumps(nb.cells[2].outputs)
    assert 'four images' in shown and 'a figure' in shown
    assert nb.cells[3].execution_count is None and contents(folder)==before

def test_an_interruption_in_jupyterlab_says_how_to_go_on(lab, capsys):
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    try:
        shell.user_ns.update(cell(A_PARAMETERS))
        shell.run_cell('from elbowsynth.stages import notebook_profile\nnotebook_profile("a", globals())').raise_error()
        capsys.readouterr()
        assert not shell.run_cell('def train(): raise KeyboardInterrupt\ntrain()').success
    finally: InteractiveShell.clear_instance()
    shown = capsys.readouterr()
    assert 'run this cell again (a training resumes from its last checkpoint)' in shown.out and 'Traceback' not in shown.out+shown.err

def run_in_kernel(path, toy, interrupt_after=None):
    "Execute a notebook from its top; the notebook with its outputs"
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    nb = nbformat.read(path, as_version=4)
    env = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_')} | {'PYTHONPATH': str(toy), 'JPY_SESSION_NAME': 'x'}
    client = NotebookClient(nb, timeout=60, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
    with client.setup_kernel(env=env):
        for i, c in enumerate(nb.cells):
            try: client.execute_cell(c, i)
            except CellExecutionError: return nb
    return nb

# Options: fields of a dataclass that are not in the parameters cell

def used_config(folder): return json.loads((folder/'model'/'config.json').read_text())

@pytest.mark.long('three runs of a stage, 17 s')
def test_setting_profile_and_plain_papermill_give_the_same_options(toy):
    study(toy, '--set', 'b.decay_rate=-0.7', '--target', 'b')
    by_setting = used_config(toy/'_runs'/'demo')
    assert by_setting=={'sleep': 0., 'decay_rate': -.7, 'optimizer': 'adafactor', 'betas': [.5, .9]}
    values = json.loads((toy/'_runs'/'demo'/'model'/'stage.json').read_text())['values']
    assert values['options']=={'decay_rate': -.7} and 'decay_rate' not in values

    (toy/'params'/'option.yaml').write_text('all: {n: 4}\nb: {decay_rate: -0.7}')
    study(toy, '--profile', 'option', '--target', 'b')
    assert used_config(toy/'_runs'/'option')==by_setting

    sh('papermill', 'nbs/2_models/02_b.ipynb', 'copy.ipynb', '-y', 'options: {decay_rate: -0.7}', '-p', 'run', '_runs/plain',
       '-k', 'python3', cwd=toy, PYTHONPATH=str(toy))
    assert used_config(toy/'_runs'/'plain')==by_setting

@pytest.mark.long('three studies, 15 s')
def test_command_line_options_take_precedence_over_the_profile(toy):
    (toy/'params'/'demo.yaml').write_text('all: {n: 4, optimizer: adam}\nb: {options: {decay_rate: -0.6, betas: [0, 0.9]}}')
    study(toy, '--set', 'decay_rate=-7e-1', '--target', 'b')
    assert used_config(toy/'_runs'/'demo')=={'sleep': 0., 'decay_rate': -.7, 'optimizer': 'adam', 'betas': [0, .9]}
    assert stages_run(study(toy, '--set', 'decay_rate=-7e-1', '--target', 'b'))==[]
    assert stages_run(study(toy, '--set', 'decay_rate=-0.5', '--target', 'b'))==['b']

def test_stage_options_name_dataclasses_that_exist():
    known = stages(ROOT/'nbs')
    profile = {s.name: {} for s in known}
    with_options = [s for s in known if s.options_class]
    assert {'sdxl', 'flux'}<={s.name for s in with_options}
    for stage in with_options: assert 'options' in stage.defaults and stage.defaults['options']=={}
    values = job_values(known, profile, ['flux.decay_rate=-0.7'])
    assert values['flux']['options']=={'decay_rate': -.7} and values['sdxl']['options']=={}
    with pytest.raises(ValueError, match='flux.decay_rate: expected float'): job_values(known, profile, ['flux.decay_rate=[1]'])

# Notebooks in folders

def test_stages_are_found_in_folders_in_the_order_of_their_numbers(toy):
    assert [s.name for s in stages(toy/'nbs')]==['a', 'b', 'c']
    checkpoints = toy/'nbs'/'2_models'/'.ipynb_checkpoints'
    checkpoints.mkdir()
    shutil.copy(toy/'nbs'/'2_models'/'02_b.ipynb', checkpoints/'02_b-checkpoint.ipynb')
    notebook(toy/'nbs'/'0_report'/'100_d.ipynb', C_PARAMETERS, C_BODY)
    assert [s.name for s in stages(toy/'nbs')]==['a', 'b', 'c', 'd']                     # 100 is after 03

def test_two_stages_of_one_name_are_refused(toy):
    notebook(toy/'nbs'/'0_report'/'04_a.ipynb', C_PARAMETERS, C_BODY)
    done = study(toy, check=False)
    assert done.returncode!=0 and "two stages are called 'a': 1_data/01_a.ipynb and 0_report/04_a.ipynb" in done.stderr

def test_this_study_has_its_stages_in_folders():
    known = {s.name: s.path.relative_to(ROOT/'nbs').as_posix() for s in stages(ROOT/'nbs')}
    assert known['masks']=='2_data/31_masks.ipynb' and known['flux']=='4_diffusion/50_flux.ipynb' and len(known)>=14

# The hash of a stage's code

def library_copy(folder):
    shutil.copytree(ROOT/'elbowsynth', folder/'elbowsynth', ignore=shutil.ignore_patterns('__pycache__', 'tiny'))
    return folder/'elbowsynth'

def change(path): path.write_text(path.read_text()+'\nchanged = 1\n')

def test_code_hash_follows_modules_in_subpackages(tmp_path):
    library = library_copy(tmp_path)
    notebook(tmp_path/'31_toy.ipynb', 'out: str = "x"  # Output folder', 'from elbowsynth.data.masks import write_masks')
    before = code_hash(tmp_path/'31_toy.ipynb', library)
    reached = set()
    for path in sorted(library.rglob('*.py')):
        text = path.read_text()
        change(path)
        if code_hash(tmp_path/'31_toy.ipynb', library)!=before: reached.add(path.relative_to(library).with_suffix('').as_posix())
        path.write_text(text)
    assert {'core', 'data/masks', 'data/images', 'data/classes', 'data/annotations'}<=reached       # images: by masks and by annotations
    assert not {'data/__init__', '__init__', 'run', 'data/dicom', 'diffusion/flux', 'gans/gan'} & reached

def test_a_change_two_modules_down_makes_a_stage_stale(tmp_path):
    library = library_copy(tmp_path)
    (library/'data'/'deep.py').write_text('value = 1')
    (library/'data'/'middle.py').write_text('from .deep import value')
    (library/'gans'/'upper.py').write_text('from ..data.middle import value')
    notebook(tmp_path/'01_toy.ipynb', 'out: str = "x"  # Output folder', 'from elbowsynth.gans.upper import value')
    before = code_hash(tmp_path/'01_toy.ipynb', library)
    (library/'data'/'deep.py').write_text('value = 1  # a comment')
    assert code_hash(tmp_path/'01_toy.ipynb', library)==before
    (library/'data'/'deep.py').write_text('value = 2')
    assert code_hash(tmp_path/'01_toy.ipynb', library)!=before

def test_flux_code_does_not_make_the_sdxl_stage_stale(tmp_path):
    library = library_copy(tmp_path)
    notebooks = {s.name: s.path for s in stages(ROOT/'nbs')}
    def hashes(): return {name: code_hash(notebooks[name], library) for name in ('sdxl', 'flux', 'finetuning_effect')}
    before = hashes()
    change(library/'diffusion'/'flux.py')
    after = hashes()
    assert after['sdxl']==before['sdxl'] and after['finetuning_effect']!=before['finetuning_effect']     # the second trains both models
    change(library/'diffusion'/'__init__.py')
    assert hashes()==after                                                              # a subpackage's table is not followed
    change(library/'diffusion'/'latents.py')
    assert all(hashes()[name]!=after[name] for name in after)

def test_public_names_are_followed_to_their_module(tmp_path):
    library = library_copy(tmp_path)
    body = 'from elbowsynth.diffusion import train_flux\nfrom elbowsynth import data\ndata.read_labels("x")'
    assert imported_modules(body)=={'diffusion.flux', 'data.labels'}
    notebook(tmp_path/'50_toy.ipynb', 'out: str = "x"  # Output folder', body)
    before = code_hash(tmp_path/'50_toy.ipynb', library)
    change(library/'diffusion'/'sdxl.py')
    assert code_hash(tmp_path/'50_toy.ipynb', library)==before
    change(library/'diffusion'/'flux.py')
    assert code_hash(tmp_path/'50_toy.ipynb', library)!=before

@pytest.mark.parametrize('source, package, modules', [
    ('from ..core import root', 'data', {'core'}),
    ('from .data.images import read_image', '', {'data.images'}),
    ('from .images import read_image', 'data', {'data.images'}),
    ('from elbowsynth.data.masks import write_masks', 'diffusion', {'data.masks'}),
    ('from . import images, classes', 'data', {'data.images', 'data.classes'}),
    ('from .. import core', 'gans', {'core'}),
    ('import elbowsynth.data.images', '', {'data.images'}),
    ('import elbowsynth.data.images as im, os', '', {'data.images'}),
    ('from ..gans import ac_gan, wgan_gp', 'report', {'gans.ac_gan', 'gans.wgan_gp'}),
    ('def f():\n    from ..data.images import read_image', 'gans', {'data.images'}),
    ('import elbowsynth\nelbowsynth.data.read_image("x")', '', {'data.images'}),
    ('import numpy as np\nfrom datasets import data', 'data', set())])
def test_imports_are_seen(source, package, modules): assert imported_modules(source, package)==modules

def test_stage_modules_include_what_they_import():
    jobs = {j.name: j for j in plan('smoke')[1]}
    assert len({j.code_hash for j in jobs.values()})==len(jobs)
    for name, module in {'masks': 'data.masks', 'flux': 'diffusion.flux', 'metrics': 'evaluation.metrics'}.items():
        cells = [''.join(c['source']) for c in json.loads((ROOT/jobs[name].notebook).read_text())['cells'] if c['cell_type']=='code']
        package, file = module.split('.')
        own = (ROOT/'elbowsynth'/package/f'{file}.py').read_text()
        assert 'core' in imported_modules('\n'.join(cells)) | imported_modules(own, package)
        assert imported_modules(own, package), f'no imports seen in {module}'

# Interruption

def wait_for(condition, seconds=60):
    end = time.time()+seconds
    while not condition():
        assert time.time()<end, 'timeout'
        time.sleep(.1)

def alive(toy):
    "Processes of the toy's study: those that work in its folder, or have it in their command line"
    def belongs(process):
        try: return str(toy) in (process/'cmdline').read_text().replace('\0', ' ') or str(toy) in os.readlink(process/'cwd')
        except OSError: return False                                # ended, or a zombie
    return [p.name for p in Path('/proc').glob('[0-9]*') if belongs(p)]

@pytest.mark.parametrize('killed', [pytest.param('study', marks=pytest.mark.long('a study of 40 s')), pytest.param('everything', marks=pytest.mark.long('a study of 20 s'))])
def test_killed_study_resumes(toy, killed):
    env = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_')} | {'PYTHONPATH': str(toy)}
    args = ['--set', 'sleep=1.0']
    p = subprocess.Popen([sys.executable, '-m', 'elbowsynth.run', 'study', *args], cwd=toy, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    model = toy/'_runs'/'demo'/'model'
    wait_for(lambda: (model/'step1').exists())
    kill = os.kill if killed=='study' else os.killpg
    kill(p.pid, signal.SIGKILL)
    p.wait()
    wait_for(lambda: not alive(toy))                                                    # no stage runs longer than its study
    assert not (model/'step5').exists()
    done = study(toy, *args)
    assert stages_run(done)==['b', 'c'] and (model/'starts').read_text()=='ss'
    assert (toy/'_runs'/'demo'/'report'/'steps').read_text()=='6'
    assert re.search(r'stage 2 of 3: b   Steps: \d of \d, 0:\d\d so far, about 0:\d\d left', done.stderr)   # progress of a long loop

# SIGTERM of a scheduler, and the records of jobs

FAKE_SLURM = """#!/bin/sh
echo "$(basename "$0") $*" >> "$SLURM_CALLS"
if [ "$(basename "$0")" = squeue ]; then echo "$SLURM_STATE"; fi
"""

def start_job(toy, name, log, **env):
    "A job of the plan, as Snakemake starts it"
    base = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_')} | {'PYTHONPATH': str(toy), 'ELBOWSYNTH_RUNNER': '1'}
    with log.open('a') as f:
        return subprocess.Popen([sys.executable, '-m', 'elbowsynth.run', 'stage', name, 'plan.json'], cwd=toy/'_runs'/'demo', env=base | env, stderr=f, stdout=f)

@pytest.fixture
def planned(toy, monkeypatch):
    "The toy checkout, and a function that writes the plan of a run"
    monkeypatch.chdir(toy)
    monkeypatch.setattr(elbowsynth, '__path__', [*elbowsynth.__path__, str(toy/'elbowsynth')])
    def write(*settings):
        folder, jobs = plan('demo', settings=settings)
        (toy/folder).mkdir(parents=True)
        _write_plan(toy/folder, jobs, '', 2)
    return toy, write

def job_record(toy, name): return json.loads((toy/'_runs'/'demo'/'logs'/f'{name}.json').read_text())

def test_sigterm_stops_a_job_and_the_same_command_goes_on(planned):
    toy, write = planned
    write('sleep=0.5')
    process = start_job(toy, 'b', toy/'b.txt')
    wait_for(lambda: (toy/'_runs'/'demo'/'model'/'step2').exists())
    assert job_record(toy, 'b')['state']=='running' and job_record(toy, 'b')['pid']==process.pid
    process.terminate()
    assert process.wait(timeout=30)==75
    stopped = job_record(toy, 'b')
    assert stopped['state']=='stopped' and re.fullmatch(r'[23] of 6', stopped['position']) and stopped['ended']-stopped['started']<30
    assert 'stopped by SIGTERM' in (toy/'b.txt').read_text() and not (toy/'_runs'/'demo'/'model'/'stage.json').exists()
    assert start_job(toy, 'b', toy/'b.txt').wait(timeout=60)==0
    done = job_record(toy, 'b')
    assert (done['state'], done['n_starts'])==('done', 2) and len(list((toy/'_runs'/'demo'/'model').glob('step*')))==6

@pytest.mark.parametrize('state, requeued', [('RUNNING', True), ('CANCELLED', False)])
def test_a_stopped_slurm_job_goes_back_into_the_queue_unless_it_comes_no_further(planned, tmp_path, state, requeued):
    toy, write = planned
    write('sleep=100')
    (tmp_path/'bin').mkdir()
    for name in ('squeue', 'scontrol'):
        (tmp_path/'bin'/name).write_text(FAKE_SLURM)
        (tmp_path/'bin'/name).chmod(0o755)
    calls = tmp_path/'calls'
    calls.touch()
    env = {'PATH': f'{tmp_path/"bin"}:{Path(sys.executable).parent}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '12', 'SLURM_CALLS': str(calls), 'SLURM_STATE': state}
    codes = []
    for start in (1, 2):
        process = start_job(toy, 'b', toy/'b.txt', **env)
        wait_for(lambda: (toy/'_runs'/'demo'/'model'/'starts').exists() and (toy/'_runs'/'demo'/'model'/'starts').read_text()=='s'*start)
        process.terminate()
        codes.append(process.wait(timeout=30))
    assert codes==[75, 1] and job_record(toy, 'b')['state']=='failed'
    assert calls.read_text().count('scontrol requeue 12')==int(requeued)                # not the second time, not a job that was cancelled
    assert 'twice without a step in between' in (toy/'b.txt').read_text() and 'fix: raise `hours`' in (toy/'b.txt').read_text()

@pytest.mark.long('three studies, 12 s')
def test_results_with_other_values_do_not_count_as_done(toy):
    "Also where Snakemake has no record of them, as after a job whose study was killed"
    study(toy, '--target', 'a')
    shutil.rmtree(toy/'_runs'/'demo'/'.snakemake')
    assert stages_run(study(toy, '--target', 'a'))==[]
    assert stages_run(study(toy, '--target', 'a', '--set', 'n=5'))==['a']
    assert json.loads((toy/'_runs'/'demo'/'raw'/'images.json').read_text())==[0, 1, 2, 3, 4]

def test_separate_jobs_of_a_profile_count_on_a_cluster_only(planned):
    toy, write = planned
    body = "stop_epoch: int = -1  # Stop here\nepochs: int = 4  # Epochs\ncheckpoint_every: int = 2  # Between checkpoints"
    notebook(toy/'nbs'/'2_models'/'02_b.ipynb', B_PARAMETERS+'\n'+body, B_BODY)
    (toy/'params'/'parts.yaml').write_text('separate_jobs: [b]')
    assert [j.name for j in plan('parts')[1]]==['a', 'b', 'c']
    jobs = {j.name: j for j in plan('parts', cluster='slurm')[1]}
    assert list(jobs)==['a', 'b.train_0002', 'b.train_0004', 'b', 'c']
    assert jobs['b'].dependencies==['a', 'b.train_0002', 'b.train_0004'] and jobs['b.train_0004'].dependencies==['b.train_0002']
    part, whole = jobs['b.train_0002'], jobs['b']
    assert {k for k in whole.values if whole.values[k]!=part.values[k]}=={'stop_epoch'} and part.code_hash==whole.code_hash
    (toy/'params'/'parts.yaml').write_text('separate_jobs: [bb]')
    with pytest.raises(ValueError, match="no stage is called 'bb'"): plan('parts')

def test_the_names_of_wgan_gps_are_those_of_their_folders():
    from elbowsynth.cluster import wgan_gp_names
    from elbowsynth.data.classes import PATHOLOGIES, VIEWS
    from elbowsynth.gans.wgan_gp import model_folder
    assert wgan_gp_names()==[model_folder(view, pathology) for view in VIEWS for pathology in PATHOLOGIES]

def test_checkpoints_of_a_plan_are_those_of_the_trainings():
    from elbowsynth.cluster import checkpoints
    from elbowsynth.diffusion.finetune import checkpoint_schedule
    for epochs, boost, every in ((200, 20, 20), (1, 1, 1), (5, 2, 2), (5, 0, 2)):
        schedule = checkpoint_schedule(10, 1, epochs, boost, every)
        assert checkpoints({'epochs': epochs, 'boost_epochs': boost, 'checkpoint_every': every})==list(schedule.checkpoints.values())
