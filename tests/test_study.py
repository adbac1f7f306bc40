"The study itself, in its smallest profile, through the real runner: these take minutes"
import json, os, re, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pandas as pd
import pytest
from conftest import ROOT, copy_of_checkout, sh
from elbowsynth.stages import stages
from elbowsynth.data.classes import caption
from elbowsynth.data.images import write_png
from elbowsynth.phantom.phantom import phantom
from elbowsynth.run import plan

pytestmark = pytest.mark.long('runs the smoke study, minutes')
STAGES = [j.name for j in plan('smoke')[1]]                         # those that stand alone, `teach` and `ablation`, are not among them

def files(folder): return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob('*') if p.is_file() and '_runs' not in p.parts and '__pycache__' not in p.parts}
def study(top, *args, check=True): return sh(sys.executable, '-m', 'elbowsynth.run', 'study', '--profile', 'smoke', *args, cwd=top, check=check, PYTHONPATH=str(top))
def stages_run(text): return re.findall(r'stage \d+ of \d+: (\w+) done', text)

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "A checkout in which the smoke study was killed in the middle and then run to its end, with what it said"
    top = copy_of_checkout(tmp_path_factory.mktemp('clone'))
    before = files(top)
    env = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_')} | {'PYTHONPATH': str(top)}
    with (top/'_first').open('w') as f:
        p = subprocess.Popen([sys.executable, '-m', 'elbowsynth.run', 'study', '--profile', 'smoke'], cwd=top, env=env, stderr=f, start_new_session=True)
        end = time.time()+600
        while not list((top/'_runs'/'smoke').glob('*/samples/0000')) and time.time()<end and p.poll() is None: time.sleep(.2)
        os.killpg(p.pid, signal.SIGKILL)                            # the first model has sampled its epoch 0: training is on
        p.wait()
    first = (top/'_first').read_text()
    (top/'_first').unlink()
    second = study(top).stderr
    return {'top': top, 'run': top/'_runs'/'smoke', 'first': first, 'second': second, 'before': before}

def test_killed_study_goes_on(smoke):
    early, late = stages_run(smoke['first']), stages_run(smoke['second'])
    assert early[:4]==['phantom', 'preprocess', 'masks', 'split'] and 'figures' not in early, smoke['first']
    assert set(early+late)==set(STAGES) and not set(early[:4]) & set(late)      # what was done before the kill is not done again

def test_nothing_is_done_twice(smoke):
    assert stages_run(study(smoke['top']).stderr)==[]

def test_nothing_is_written_outside_runs(smoke): assert files(smoke['top'])==smoke['before']

def test_every_model_has_a_film_for_each_test_pair_at_each_checkpoint(smoke):
    pairs = pd.read_csv(smoke['run']/'split'/'pairs.csv')
    test = set(pairs[pairs.split=='test'].pair)
    for model in ('ac_gan', 'tac_gan', 'sdxl', 'flux'):
        epochs = sorted((smoke['run']/model/'samples').iterdir())
        assert epochs[0].name=='0000' and len(epochs)>=2
        for e in epochs: assert {p.stem for p in e.glob('*.png')}==test
    models = pd.read_csv(smoke['run']/'wgan_gp'/'models.csv')
    assert models.trained.astype(str).str.lower().isin(['true', 'yes']).sum()==2 and models.n_test.sum()==len(test)

def test_validation_patients_choose_and_the_report_shows_it(smoke):
    pairs = pd.read_csv(smoke['run']/'split'/'pairs.csv').set_index('pair')
    for model in ('ac_gan', 'tac_gan'):
        held = {p.stem for p in (smoke['run']/model/'validation').rglob('*.png')}
        assert held and (pairs.split[sorted(held)]=='train').all()
    choice = pd.read_csv(smoke['run']/'metrics'/'choice.csv').set_index('model')
    assert choice.chosen_epoch[['ac_gan', 'tac_gan']].notna().all() and choice.chosen_epoch[['sdxl', 'flux']].isna().all()
    trials = pd.read_csv(smoke['run']/'search'/'trials.csv')
    assert trials.groupby('model').size().to_dict()=={'ac_gan': 2, 'tac_gan': 2} and set(json.loads((smoke['run']/'search'/'best.json').read_text()))=={'ac_gan', 'tac_gan'}
    page = (smoke['run']/'report.html').read_text()
    assert 'is no ranking' in page and 'Chosen by validation' in page

def test_what_the_search_found_can_be_trained_with(smoke):
    "`searched` makes the search a stage that the training waits for"
    done = study(smoke['top'], '--run', 'smoke', '--set', 'ac_gan.searched=search', '--target', 'ac_gan')
    assert stages_run(done.stderr)[-1]=='ac_gan'
    cause, best = (json.loads((smoke['run']/n).read_text()) for n in ('ac_gan/cause.json', 'search/best.json'))
    assert cause['lr']==[best['ac_gan']['values'][k] for k in ('lr_g', 'lr_d', 'lr_c')] and cause['batch']==best['ac_gan']['values']['batch']
    study(smoke['top'])                                             # back to the tables' values

def test_scores_are_those_of_another_library(smoke):
    "SSIM of a film, read back from the files of the run, as piq gives it"
    import cv2, piq, torch
    scores = pd.read_csv(smoke['run']/'metrics'/'scores.csv')
    assert scores.ssim.between(-1, 1).all() and scores.ms_ssim.between(-1, 1).all() and not scores.isna().any().any()
    row = scores[(scores.model=='sdxl') & (scores.kind=='samples')].iloc[-1]
    size = json.loads((smoke['run']/'metrics'/'stage.json').read_text())['values']['size']
    read = lambda p: torch.from_numpy(cv2.resize(cv2.imread(str(p), 0), (size, size), interpolation=cv2.INTER_LINEAR)/255.)[None, None]     # as they are, or enlarged
    real, fake = read(smoke['run']/'images'/f'{row.pair.split("__")[0]}.png'), read(smoke['run']/'sdxl'/'samples'/f'{row.epoch:04d}'/f'{row.pair}.png')
    assert real.shape[-1]==size
    assert abs(float(piq.ssim(real, fake, data_range=1.))-row.ssim)<1e-4

def test_the_report_can_be_read(smoke):
    page = (smoke['run']/'report.html').read_text()
    assert page.count('data:image/png')+page.count('<svg')>=5 and 'Where the time went' in page
    assert not re.search(r'(src|href)="https?://[^"]*\.(js|css)', page) and '<script' not in page
    assert str(smoke['run']/'report.html') in smoke['second']

def test_notebooks_run_from_the_top_in_jupyter(smoke):
    "As in JupyterLab: a fresh kernel, no papermill, the profile asked for by the cell below the parameters"
    code = '''
import os, sys, nbformat
from nbclient import NotebookClient
for path in sys.argv[1:]:
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': 'nbs'}}).execute()
    print(path, [o.data['text/plain'] for c in nb.cells if 'lab_profile(' in c.source for o in c.get('outputs', []) if 'data' in o][-1:])
'''
    notebooks = sorted(p.relative_to(ROOT) for p in (ROOT/'nbs').glob('*.ipynb'))
    run = lambda part: sh(sys.executable, '-c', code, *part, cwd=smoke['top'], PYTHONPATH=str(smoke['top']), ELBOWSYNTH_PROFILE='smoke', JPY_SESSION_NAME='lab').stdout
    with ThreadPoolExecutor(2) as pool: said = ''.join(pool.map(run, (notebooks[::2], notebooks[1::2])))
    assert said.count("'run': '_runs/smoke'")==len(stages(ROOT/'nbs')) and said.count('.ipynb [')==len(notebooks), said

def strangers_folder(folder, patients, size=300):
    "Films as a stranger has them: subfolders, a semicolon table, views and sides written out, some inverted or padded, masks for a few"
    rows, classes = [], ['normal', 'supracondylar fracture', 'joint effusion', 'soft tissue swelling', 'olecranon fracture']
    for i in range(patients):
        side, pathology = 'LR'[i%2], classes[i%len(classes)]
        for view in ('AP', 'LAT'):
            film = phantom(view, [pathology], side=side, age=6+i, seed=100+i, size=size)
            image = 255-film.image if i%7==3 else film.image
            if i%5==4: image = np.pad(image, ((0, 40), (25, 0)), constant_values=int(image[0, 0]))
            name = f'ward {i%3}/{view.lower()}_{i:03d}.png'
            write_png(folder/name, image)
            mask = ''
            if i%4==0 and image.shape==film.image.shape:
                mask = f'ward {i%3}/drawn/{view.lower()}_{i:03d}.png'
                write_png(folder/mask, film.masks[pathology].astype(np.uint8)*255)
            rows.append([name, f'case-{i}', {'AP': 'anteroposterior', 'LAT': 'Lateral'}[view], {'L': 'left', 'R': 'Right'}[side], pathology.upper() if i%2 else pathology, mask])
    (folder/'labels.csv').write_text('\ufeffFile;Patient;View;Side;Pathology;Mask\n'+'\n'.join(';'.join(r) for r in rows), encoding='utf-8')

def test_a_strangers_sixty_films(smoke, tmp_path):
    strangers_folder(tmp_path/'films', 30)
    cut = tmp_path/'films'/'ward 1'/'lat_001.png'
    cut.write_bytes(cut.read_bytes()[:5000])
    untouched = files(tmp_path/'films')
    said = study(smoke['top'], '--data', tmp_path/'films').stderr
    run = smoke['top']/'_runs'/'smoke-films'
    pairs = pd.read_csv(run/'split'/'pairs.csv')
    rejects = pd.read_csv(run/'images'/'rejects.csv')
    assert rejects.file.tolist()==['ward 1/lat_001.png'] and rejects.reason.notna().all()
    assert len(pairs)==59 and pairs.patient.nunique()==30 and set(pairs.view)=={'AP', 'LAT'} and set(pairs.side)=={'L', 'R'}
    assert set(pairs.mask_source)=={'drawn', 'suggested'} and 'phantom' not in stages_run(said)
    assert pd.read_csv(run/'images'/'images.csv').inverted.sum()==2*sum(i%7==3 for i in range(30))
    assert (run/'report.html').exists() and files(tmp_path/'films')==untouched

def test_a_faulty_folder_is_told_at_once(smoke, tmp_path):
    strangers_folder(tmp_path/'films', 2)
    table = (tmp_path/'films'/'labels.csv').read_text(encoding='utf-8-sig').replace('NORMAL', 'FINE').replace('supracondylar', 'supra').replace('SUPRACONDYLAR', 'SUPRA')
    (tmp_path/'films'/'labels.csv').write_text(table)
    (tmp_path/'films'/'ward 0'/'drawn'/'lat_000.png').write_bytes(b'no picture')
    done = study(smoke['top'], '--data', tmp_path/'films', '--run', 'faulty', check=False)
    assert done.returncode!=0 and 'preprocess FAILED' in done.stderr and stages_run(done.stderr)==[]
    assert done.stderr.count("unknown pathology 'SUPRA FRACTURE'")==2 and 'drawn/lat_000.png' in done.stderr

def two_made_up(folder):
    "An AP and a LAT film of one patient"
    for view in ('AP', 'LAT'): write_png(folder/f'{view}.png', phantom(view, ['normal'], side='L', age=30, seed=1, size=400).image)
    (folder/'labels.csv').write_text('file,patient,view,side,pathology\nAP.png,1,AP,L,normal\nLAT.png,1,LAT,L,normal\n')

def two_real(folder):
    "The two radiographs of a physical phantom, where they are at hand"
    for view in ('AP', 'LAT'): shutil.copy(ROOT.parent/'shared'/'radiographs'/f'008_{view}.png', folder)
    (folder/'labels.csv').write_text('file,patient,view,side,pathology\n008_AP.png,1,AP,L,normal\n008_LAT.png,1,LAT,L,normal\n')

REAL = pytest.mark.skipif(not (ROOT.parent/'shared'/'radiographs'/'008_AP.png').exists(), reason='the two real radiographs are not beside the checkout')
FILMS = [two_made_up, pytest.param(two_real, marks=REAL)]

@pytest.mark.parametrize('make', FILMS)
def test_two_films_of_one_patient(smoke, tmp_path, make):
    films = tmp_path/make.__name__
    films.mkdir()
    make(films)
    done = study(smoke['top'], '--data', films, check=False)
    assert done.returncode!=0 and stages_run(done.stderr)==['preprocess', 'masks'] and 'neither is ever in both sets' in done.stderr
    args = ['--data', films, '--set', 'split= epochs=0 boost_epochs=0 sdxl.out=sdxl_untrained flux.out=flux_untrained', '--target', 'sdxl', '--target', 'flux']
    drawn = study(smoke['top'], *args)
    assert stages_run(drawn.stderr)[-2:] in (['sdxl', 'flux'], ['flux', 'sdxl'])
    pairs = pd.read_csv(smoke['top']/'_runs'/f'smoke-{films.name}'/'masks'/'pairs.csv')
    assert pairs.caption.tolist()==[caption(v, ['normal']) for v in ('AP', 'LAT')]
    for model in ('sdxl', 'flux'):
        assert {p.stem for p in (smoke['top']/'_runs'/f'smoke-{films.name}'/f'{model}_untrained'/'samples'/'0000').glob('*.png')}==set(pairs.pair)
