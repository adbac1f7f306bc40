"The study itself, in its smallest profile, through the real runner: these take minutes"
import json, os, re, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pandas as pd
import pytest, yaml
from conftest import ROOT, copy_of_checkout, sh
from elbowsynth.stages import stages
from elbowsynth.data.classes import caption
from elbowsynth.data.images import write_png
from elbowsynth.phantom.phantom import phantom
from elbowsynth.run import plan

pytestmark = pytest.mark.long('runs the smoke study, minutes')
STAGES = [j.name for j in plan('smoke')[1]]                         # the experiments are not among them

def files(folder):
    "Relative path to size of all files outside of runs"
    paths = [p for p in folder.rglob('*') if p.is_file() and not {'_runs', '__pycache__'} & set(p.parts)]
    return {str(p.relative_to(folder)): p.stat().st_size for p in paths}
def study(top, *args, check=True): return sh(sys.executable, '-m', 'elbowsynth.run', 'study', '--profile', 'smoke', *args, cwd=top, check=check, PYTHONPATH=str(top))
def stages_run(text): return re.findall(r'stage \d+ of \d+: (\w+) done', text)

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "A checkout in which the smoke study was killed in the middle and then run to its end, with its output"
    top = copy_of_checkout(tmp_path_factory.mktemp('clone'))
    before = files(top)
    env = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_')} | {'PYTHONPATH': str(top)}
    with (top/'_first').open('w') as f:
        p = subprocess.Popen([sys.executable, '-m', 'elbowsynth.run', 'study', '--profile', 'smoke'], cwd=top, env=env, stderr=f, start_new_session=True)
        end = time.time()+600
        while not list((top/'_runs'/'smoke').glob('*/samples/0000')) and time.time()<end and p.poll() is None: time.sleep(.2)
        os.killpg(p.pid, signal.SIGKILL)                            # the first model has sampled its epoch 0 and is in training
        p.wait()
    first = (top/'_first').read_text()
    (top/'_first').unlink()
    second = study(top).stderr
    return {'top': top, 'run': top/'_runs'/'smoke', 'first': first, 'second': second, 'before': before}

def test_killed_study_resumes(smoke):
    early, late = stages_run(smoke['first']), stages_run(smoke['second'])
    assert early[:4]==['phantom', 'preprocess', 'masks', 'split'] and 'figures' not in early, smoke['first']
    assert set(early+late)==set(STAGES) and not set(early[:4]) & set(late)      # finished stages do not run again

def test_finished_study_runs_nothing(smoke):
    assert stages_run(study(smoke['top']).stderr)==[]

def test_nothing_is_written_outside_runs(smoke): assert files(smoke['top'])==smoke['before']

def test_every_model_has_an_image_for_each_test_pair_at_each_checkpoint(smoke):
    pairs = pd.read_csv(smoke['run']/'split'/'pairs.csv')
    test = set(pairs[pairs.split=='test'].pair)
    for model in ('ac_gan', 'tac_gan', 'sdxl', 'flux'):
        epochs = sorted((smoke['run']/model/'samples').iterdir())
        assert epochs[0].name=='0000' and len(epochs)>=2
        for e in epochs: assert {p.stem for p in e.glob('*.png')}==test
    models = pd.read_csv(smoke['run']/'wgan_gp'/'models.csv')
    assert models.trained.astype(str).str.lower().isin(['true', 'yes']).sum()==2 and models.n_test.sum()==len(test)

def test_checkpoints_are_selected_by_validation_patients(smoke):
    pairs = pd.read_csv(smoke['run']/'split'/'pairs.csv').set_index('pair')
    for model in ('ac_gan', 'tac_gan'):
        validation = {p.stem for p in (smoke['run']/model/'validation').rglob('*.png')}
        assert validation and (pairs.split[sorted(validation)]=='train').all()
    selection = pd.read_csv(smoke['run']/'metrics'/'checkpoint_selection.csv').set_index('model')
    assert selection.selected_epoch[['ac_gan', 'tac_gan']].notna().all() and selection.selected_epoch[['sdxl', 'flux']].isna().all()
    trials = pd.read_csv(smoke['run']/'search'/'trials.csv')
    best = json.loads((smoke['run']/'search'/'best_hyperparameters.json').read_text())
    assert trials.groupby('model').size().to_dict()=={'ac_gan': 2, 'tac_gan': 2} and set(best)=={'ac_gan', 'tac_gan'}
    page = (smoke['run']/'report.html').read_text()
    assert 'is no ranking' in page and 'Selected by validation' in page

def test_training_can_use_the_hyperparameters_of_the_search(smoke):
    "With `hyperparameters_from`, training depends on the search"
    done = study(smoke['top'], '--run', 'smoke', '--set', 'ac_gan.hyperparameters_from=search', '--target', 'ac_gan')
    assert stages_run(done.stderr)[-1]=='ac_gan'
    config = json.loads((smoke['run']/'ac_gan'/'config.json').read_text())
    best = json.loads((smoke['run']/'search'/'best_hyperparameters.json').read_text())['ac_gan']['hyperparameters']
    assert config['lr']==[best[k] for k in ('lr_g', 'lr_d', 'lr_classifier')] and config['batch_size']==best['batch_size']
    study(smoke['top'])                                             # the paper's values again

def test_scores_agree_with_another_library(smoke):
    "SSIM of an image, computed from the files of the run by piq"
    import cv2, piq, torch
    scores = pd.read_csv(smoke['run']/'metrics'/'scores.csv')
    assert scores.ssim.between(-1, 1).all() and scores.ms_ssim.between(-1, 1).all() and not scores.isna().any().any()
    row = scores[(scores.model=='sdxl') & (scores.source=='samples')].iloc[-1]
    size = json.loads((smoke['run']/'metrics'/'stage.json').read_text())['values']['size']
    def read(path):
        "An image in [0, 1], upsampled if it is smaller"
        image = cv2.resize(cv2.imread(str(path), 0), (size, size), interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(image/255.)[None, None]
    real = read(smoke['run']/'images'/f'{row.pair.split("__")[0]}.png')
    fake = read(smoke['run']/'sdxl'/'samples'/f'{row.epoch:04d}'/f'{row.pair}.png')
    assert real.shape[-1]==size
    assert abs(float(piq.ssim(real, fake, data_range=1.))-row.ssim)<1e-4

def test_report_is_complete_and_offline(smoke):
    page = (smoke['run']/'report.html').read_text()
    assert page.count('data:image/png')>=5 and page.count('data:image/svg+xml')>=5 and 'Duration of the stages' in page
    assert page.index('id="findings"')<page.index('What not to conclude')<page.index('<figure')<page.index('<table')<page.index('<details')
    assert page.count('-nearest')==0 and page.count('below each the nearest training image')>=5 and 'No description' not in page
    assert not re.search(r'(src|href)="https?://[^"]*\.(js|css)', page) and '<script' not in page
    assert str(smoke['run']/'report.html') in smoke['second']

def test_stages_run_by_plain_papermill_from_any_folder(smoke, tmp_path):
    "`papermill NOTEBOOK OUT -f PARAMS.yaml`, without our runner; finished work is found and kept"
    run = tmp_path/'run'
    shutil.copytree(smoke['run'], run)
    before = {p: p.read_bytes() for p in run.rglob('*.csv')}
    for job in json.loads((smoke['run']/'plan.json').read_text())['jobs']:
        (tmp_path/'params.yaml').write_text(yaml.safe_dump(job['values'] | {'run': str(run)}))
        record = run/job['out']/'stage.json'
        recorded = record.read_bytes()
        record.unlink()
        sh('papermill', smoke['top']/job['notebook'], tmp_path/'out.ipynb', '-f', tmp_path/'params.yaml', '--no-progress-bar',
           cwd=tmp_path, PYTHONPATH=str(smoke['top']), ELBOWSYNTH_PROFILE='none')
        record.write_bytes(recorded)                                                    # which later stages show
    changed = [p.relative_to(run) for p, data in before.items() if p.exists() and p.read_bytes()!=data]
    assert changed==[], changed

def test_notebooks_run_from_the_top_in_jupyter(smoke):
    """As in JupyterLab: a new kernel, no papermill; the cell below the parameters completes them. The run is not finished, so its stages run

    All stages, and every eighth of the other notebooks, whose cells run in `test_cells_pass`
    """
    shutil.copytree(smoke['run'], smoke['run'].with_name('lab'))
    for path in smoke['run'].with_name('lab').rglob('stage.json'): path.unlink()
    code = '''
import os, sys, nbformat
from nbclient import NotebookClient
for path in sys.argv[1:]:
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': os.path.dirname(path)}}).execute()
    print(path, [o.text for c in nb.cells if 'start_stage(' in c.source for o in c.get('outputs', []) if o.output_type=='stream'][-1:])
'''
    notebooks = sorted((p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts), key=lambda p: p.name)
    assert len(notebooks)>=50
    of_stages = {s.path.relative_to(ROOT) for s in stages(ROOT/'nbs')}
    others = [n for n in notebooks if n not in of_stages]
    notebooks = sorted([*of_stages, *others[::8]], key=lambda p: p.name)
    def run(part):
        "Execute notebooks, each with a kernel of its own"
        return sh(sys.executable, '-c', code, *part, cwd=smoke['top'], PYTHONPATH=str(smoke['top']), ELBOWSYNTH_PROFILE='smoke', ELBOWSYNTH_RUN='lab', JPY_SESSION_NAME='lab', timeout=3600).stdout
    with ThreadPoolExecutor(2) as pool: printed = ''.join(pool.map(run, (notebooks[::2], notebooks[1::2])))
    assert printed.count("run = '_runs/lab'")==len(stages(ROOT/'nbs')) and printed.count('.ipynb [')==len(notebooks), printed

def test_a_finished_stage_in_jupyterlab_changes_nothing(smoke):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in smoke['run'].rglob('*') if p.is_file()}
    path = next(s.path for s in stages(smoke['top']/'nbs') if s.name=='split')
    done = sh('jupyter', 'nbconvert', '--execute', '--to', 'notebook', '--stdout', path, cwd=smoke['top'], check=False, PYTHONPATH=str(smoke['top']),
              ELBOWSYNTH_PROFILE='smoke', JPY_SESSION_NAME='lab')
    assert 'split is finished in _runs/smoke/split. Nothing was run or changed' in done.stderr
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in smoke['run'].rglob('*') if p.is_file()}==before

def user_folder(folder, patients, size=300):
    "Images as users have them: subfolders, a table with semicolons, views and sides written out, some inverted or padded, masks for a few"
    rows, classes = [], ['normal', 'supracondylar fracture', 'joint effusion', 'soft tissue swelling', 'olecranon fracture']
    for i in range(patients):
        side, pathology = 'LR'[i%2], classes[i%len(classes)]
        for view in ('AP', 'LAT'):
            simulated = phantom(view, [pathology], side=side, age=6+i, seed=100+i, size=size)
            image = 255-simulated.image if i%7==3 else simulated.image
            if i%5==4: image = np.pad(image, ((0, 40), (25, 0)), constant_values=int(image[0, 0]))
            name = f'ward {i%3}/{view.lower()}_{i:03d}.png'
            write_png(folder/name, image)
            mask = ''
            if i%4==0 and image.shape==simulated.image.shape:
                mask = f'ward {i%3}/masks/{view.lower()}_{i:03d}.png'
                write_png(folder/mask, simulated.masks[pathology].astype(np.uint8)*255)
            view_text, side_text = {'AP': 'anteroposterior', 'LAT': 'Lateral'}[view], {'L': 'left', 'R': 'Right'}[side]
            rows.append([name, f'case-{i}', view_text, side_text, pathology.upper() if i%2 else pathology, mask])
    (folder/'labels.csv').write_text('\ufeffFile;Patient;View;Side;Pathology;Mask\n'+'\n'.join(';'.join(r) for r in rows), encoding='utf-8')

def test_sixty_images_of_a_user(smoke, tmp_path):
    user_folder(tmp_path/'user images', 30)
    damaged = tmp_path/'user images'/'ward 1'/'lat_001.png'
    damaged.write_bytes(damaged.read_bytes()[:5000])
    untouched = files(tmp_path/'user images')
    output = study(smoke['top'], '--data', tmp_path/'user images').stderr
    run = smoke['top']/'_runs'/'smoke-user images'
    pairs = pd.read_csv(run/'split'/'pairs.csv')
    rejects = pd.read_csv(run/'images'/'rejects.csv')
    assert rejects.file.tolist()==['ward 1/lat_001.png'] and rejects.reason.notna().all()
    assert len(pairs)==59 and pairs.patient.nunique()==30 and set(pairs.view)=={'AP', 'LAT'} and set(pairs.side)=={'L', 'R'}
    assert set(pairs.mask_source)=={'annotated', 'heuristic'} and 'phantom' not in stages_run(output)
    assert pd.read_csv(run/'images'/'images.csv').inverted.sum()==2*sum(i%7==3 for i in range(30))
    assert (run/'report.html').exists() and files(tmp_path/'user images')==untouched

def test_errors_of_a_folder_are_reported_together(smoke, tmp_path):
    user_folder(tmp_path/'user images', 2)
    table = (tmp_path/'user images'/'labels.csv').read_text(encoding='utf-8-sig').replace('NORMAL', 'FINE').replace('supracondylar', 'supra').replace('SUPRACONDYLAR', 'SUPRA')
    (tmp_path/'user images'/'labels.csv').write_text(table)
    (tmp_path/'user images'/'ward 0'/'masks'/'lat_000.png').write_bytes(b'not an image')
    done = study(smoke['top'], '--data', tmp_path/'user images', '--run', 'faulty', check=False)
    assert done.returncode!=0 and 'preprocess FAILED' in done.stderr and stages_run(done.stderr)==[]
    assert done.stderr.count("unknown pathology 'SUPRA FRACTURE'")==2 and 'masks/lat_000.png' in done.stderr

def two_simulated(folder):
    "An AP and a LAT image of one patient"
    for view in ('AP', 'LAT'): write_png(folder/f'{view}.png', phantom(view, ['normal'], side='L', age=30, seed=1, size=400).image)
    (folder/'labels.csv').write_text('file,patient,view,side,pathology\nAP.png,1,AP,L,normal\nLAT.png,1,LAT,L,normal\n')

def two_real(folder):
    "The two radiographs of a physical phantom, where they are available"
    for view in ('AP', 'LAT'): shutil.copy(ROOT.parent/'shared'/'radiographs'/f'008_{view}.png', folder)
    (folder/'labels.csv').write_text('file,patient,view,side,pathology\n008_AP.png,1,AP,L,normal\n008_LAT.png,1,LAT,L,normal\n')

REAL = pytest.mark.skipif(not (ROOT.parent/'shared'/'radiographs'/'008_AP.png').exists(), reason='the two real radiographs are not next to the checkout')
TWO_IMAGES = [two_simulated, pytest.param(two_real, marks=REAL)]

@pytest.mark.parametrize('make', TWO_IMAGES)
def test_two_images_of_one_patient(smoke, tmp_path, make):
    folder = tmp_path/make.__name__
    folder.mkdir()
    make(folder)
    done = study(smoke['top'], '--data', folder, check=False)
    assert done.returncode!=0 and stages_run(done.stderr)==['preprocess', 'masks'] and 'neither may be in both sets' in done.stderr
    args = ['--data', folder, '--set', 'split= epochs=0 boost_epochs=0 sdxl.out=sdxl_untrained flux.out=flux_untrained', '--target', 'sdxl', '--target', 'flux']
    inpainted = study(smoke['top'], *args)
    assert stages_run(inpainted.stderr)[-2:] in (['sdxl', 'flux'], ['flux', 'sdxl'])
    pairs = pd.read_csv(smoke['top']/'_runs'/f'smoke-{folder.name}'/'masks'/'pairs.csv')
    assert pairs.caption.tolist()==[caption(v, ['normal']) for v in ('AP', 'LAT')]
    for model in ('sdxl', 'flux'):
        assert {p.stem for p in (smoke['top']/'_runs'/f'smoke-{folder.name}'/f'{model}_untrained'/'samples'/'0000').glob('*.png')}==set(pairs.pair)
