"The runner, on a toy study of three stages that take a second each"
import fcntl, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat
import pytest
from conftest import ROOT, sh
from elbowsynth.run import code_hash, imported_modules, job_values, plan
from elbowsynth.stages import stages

def notebook(path, parameters, body):
    "Write a stage notebook"
    nb = nbformat.v4.new_notebook(metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    imports = nbformat.v4.new_code_cell('import json, time\nfrom pathlib import Path\nfrom elbowsynth.core import progress, root')
    nb.cells = [imports, nbformat.v4.new_code_cell(parameters, metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(body)]
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

@pytest.fixture
def toy(tmp_path):
    "A checkout with three stages: a writes images, b reads them slowly and can resume, c reads b"
    for n in ('workflow', 'elbowsynth'): shutil.copytree(ROOT/n, tmp_path/n, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'elbowsynth'/'toy_settings.py').write_text(TOY_SETTINGS)
    (tmp_path/'params').mkdir()
    (tmp_path/'params'/'demo.yaml').write_text('all: {n: 4}')
    notebook(tmp_path/'nbs'/'1_data'/'01_a.ipynb', A_PARAMETERS, A_BODY)
    notebook(tmp_path/'nbs'/'2_models'/'02_b.ipynb', B_PARAMETERS, B_BODY)
    notebook(tmp_path/'nbs'/'0_report'/'03_c.ipynb', C_PARAMETERS, C_BODY)                       # its folder is listed first
    return tmp_path

def study(toy, *args, check=True, **env): return sh(sys.executable, '-m', 'elbowsynth.run', 'study', *args, cwd=toy, check=check, PYTHONPATH=str(toy), **env)
def stages_run(done): return [name for _, name in re.findall(r'stage (\d of \d): (\w+) done', done.stderr)]

def test_runs_in_order_and_not_twice(toy):
    (toy/'home').mkdir()
    first = study(toy, HOME=str(toy/'home'))
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
    assert stages_run(study(toy, '--set', 'seed=1'))==['a', 'b', 'c']                   # what changed, and what reads it
    assert stages_run(study(toy, '--set', 'seed=1', '--set', 'sleep=0.01'))==['b', 'c']
    b = toy/'nbs'/'2_models'/'02_b.ipynb'
    nb = json.loads(b.read_text())
    nb['cells'][2]['source'] = '# a comment\n'+''.join(nb['cells'][2]['source'])
    b.write_text(json.dumps(nb))
    assert stages_run(study(toy, '--set', 'seed=1', '--set', 'sleep=0.01'))==[]         # a comment makes nothing stale
    written_outside = {p.name for p in toy.iterdir()}-{'workflow', 'elbowsynth', 'settings.ini', 'nbs', 'params', 'home'}
    assert written_outside=={'_runs'}, written_outside

@pytest.mark.long('four studies, 40 s')
def test_user_folder_replaces_the_first_stage(toy):
    (toy/'my images').mkdir()
    assert stages_run(study(toy, '--data', toy/'my images'))==['b', 'c']
    assert (toy/'_runs'/'demo-my images'/'report'/'steps').exists() and not (toy/'_runs'/'demo-my images'/'raw').exists()
    (toy/'other'/'my images').mkdir(parents=True)
    done = study(toy, '--data', toy/'other'/'my images', check=False)
    assert done.returncode!=0 and 'fix: choose another folder with RUN=NAME' in done.stderr              # two folders of one name
    (toy/'my images'/'new.png').touch()
    assert stages_run(study(toy, '--data', toy/'my images'))==['b', 'c']                # the folder changed

@pytest.mark.parametrize('args, message', [
    (['--set', 'sed=1'], "'sed=1': no stage has a parameter 'sed'; did you mean 'seed'?"),
    (['--profile', 'big'], "unknown profile 'big'; params has demo"),
    (['--set', 'n=many seed=1'], "a.n: expected int (default 99), got 'many'"),
    (['--data', 'nowhere'], 'DATA=nowhere: no such folder'),
    (['--run', '../out'], 'expected the name of a folder below _runs'),
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

def test_failed_stage_names_notebook_cell_and_log(toy):
    done = study(toy, '--set', 'fail=true', check=False)
    assert done.returncode!=0
    for text in ('b FAILED in nbs/2_models/02_b.ipynb, cell 3: `o = root()/run/out`', 'ValueError: no model', '_runs/demo/logs/b.log',
                 '_runs/demo/notebooks/02_b.ipynb', 'not finished: b, c'):
        assert text in done.stderr, done.stderr
    assert 'no model' in (toy/'_runs'/'demo'/'logs'/'b.log').read_text()
    assert stages_run(study(toy))==['b', 'c']                                           # without the error it resumes

def test_one_study_at_a_time_in_a_folder(toy):
    (toy/'_runs'/'demo').mkdir(parents=True)
    with (toy/'_runs'/'demo'/'.lock').open('w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = study(toy, check=False)
    assert done.returncode!=0 and 'another study is running in' in done.stderr and not (toy/'_runs'/'demo'/'raw').exists()

# Options: fields of a dataclass that are not in the parameters cell

def used_config(folder): return json.loads((folder/'model'/'config.json').read_text())

def test_setting_profile_and_plain_papermill_give_the_same_options(toy):
    study(toy, '--set', 'b.decay_rate=-0.7', '--target', 'b')
    by_setting = used_config(toy/'_runs'/'demo')
    assert by_setting=={'sleep': 0., 'decay_rate': -.7, 'optimizer': 'adafactor', 'betas': [.5, .9]}
    values = json.loads((toy/'_runs'/'demo'/'model'/'stage.json').read_text())['values']
    assert values['options']=={'decay_rate': -.7} and 'decay_rate' not in values

    (toy/'params'/'option.yaml').write_text('all: {n: 4}\nb: {decay_rate: -0.7}')
    study(toy, '--profile', 'option', '--target', 'b')
    assert used_config(toy/'_runs'/'option')==by_setting

    sh('papermill', toy/'nbs'/'2_models'/'02_b.ipynb', toy/'copy.ipynb', '-y', 'options: {decay_rate: -0.7}', '-p', 'run', '_runs/plain',
       '-k', 'python3', cwd=toy, PYTHONPATH=str(toy))
    assert used_config(toy/'_runs'/'plain')==by_setting

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

@pytest.mark.parametrize('killed', [pytest.param('study', marks=pytest.mark.long('a study of 40 s')), 'everything'])
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
