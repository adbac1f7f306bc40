"The search leaves the test set alone, goes on after a kill, and gives the same trials again; rankings want seeds; the twin's signs"
import json, os, re, signal, subprocess, sys, time
import matplotlib
matplotlib.use('agg')
import numpy as np, pandas as pd
import pytest, torch
from conftest import ROOT
from elbowsynth.gans import search, tac_gan
from elbowsynth.data.classes import caption
from elbowsynth.data.images import write_png
from elbowsynth.report.run_summary import ranking, seed_table
from elbowsynth.evaluation.metrics import checkpoint_selection, selected_epoch
from elbowsynth.phantom.phantom import phantom

SMALL = dict(validation_fraction=.4, epochs=2, width=1/16, extractor='efficientnet_lite0', device='cpu')

@pytest.fixture(scope='module')
def films():
    "Ten patients, an AP and a LAT film each"
    rows = [(f'f{i}_{v}', f'p{i}', v, 'LR'[i%2], ['normal', 'joint effusion'][i%3>0]) for i in range(10) for v in ('AP', 'LAT')]
    pairs = pd.DataFrame(rows, columns=['image', 'patient', 'view', 'side', 'pathology'])
    pairs['pair'] = [f'{o.image}__{o.pathology.replace(" ", "_")}' for o in pairs.itertuples()]
    pairs['caption'] = [caption(o.view, [o.pathology]) for o in pairs.itertuples()]
    images = np.stack([phantom(o.view, [o.pathology], side=o.side, age=10, seed=i, size=96).image[::3, ::3] for i, o in enumerate(pairs.itertuples())])
    return images, pairs

def trials(out): return (out/'trials.csv').read_bytes()

def test_the_same_seed_gives_the_same_trials(films, tmp_path):
    torch.set_num_threads(1)
    for name, seed in (('one', 0), ('two', 0), ('other', 1)): search.search_hyperparameters(*films, tmp_path/name, n_trials=2, seed=seed, **SMALL)
    assert trials(tmp_path/'one')==trials(tmp_path/'two')!=trials(tmp_path/'other')
    lines = [json.loads(l) for l in (tmp_path/'one'/'journal.jsonl').read_text().splitlines()]  # plain JSON, and only finished trials in it
    assert sum('params' in l for l in lines)==4

KILLED = '''
import sys, numpy as np, pandas as pd, torch
from elbowsynth.gans.search import search_values
torch.set_num_threads(1)
search_values(np.load(sys.argv[1]), pd.read_csv(sys.argv[2]), sys.argv[3], n_trials=2, validation_fraction=.4, epochs=2, width=1/16, extractor='efficientnet_lite0', device='cpu')
'''

def test_a_killed_search_goes_on_with_the_same_trials(films, tmp_path):
    np.save(tmp_path/'films.npy', films[0])
    films[1].to_csv(tmp_path/'pairs.csv', index=False)
    command = lambda out: [sys.executable, '-c', KILLED, tmp_path/'films.npy', tmp_path/'pairs.csv', tmp_path/out]
    run = dict(env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, cwd=tmp_path)
    for sign in ('ac_gan_001/samples/0000', 'tac_gan_000'):             # in the middle of a training, and between two trials
        p, end = subprocess.Popen(command('killed'), **run), time.time()+120
        while not (tmp_path/'killed'/'trials'/sign).exists() and p.poll() is None and time.time()<end: time.sleep(.01)
        os.kill(p.pid, signal.SIGKILL)
        assert p.wait()==-signal.SIGKILL and not (tmp_path/'killed'/'best.json').exists()
    with (tmp_path/'killed'/'journal.jsonl').open('a') as f: f.write('{"op_code":4,"worker_id"')
    (tmp_path/'killed'/'journal.jsonl.lock').touch()
    for out in ('killed', 'whole'): subprocess.run(command(out), check=True, **run)
    assert trials(tmp_path/'killed')==trials(tmp_path/'whole')
    assert (tmp_path/'killed'/'best.json').read_bytes()==(tmp_path/'whole'/'best.json').read_bytes()

def run_cell(folder):
    "The cell of the stage notebook that searches, with its parameters"
    cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs'/'3_gans/39_search.ipynb').read_text())['cells'] if c['cell_type']=='code']
    at = next(i for i, c in enumerate(cells) if c.startswith('run: str'))
    from elbowsynth.data.labels import read_pairs
    space = vars(search) | {'read_pairs': read_pairs, 'root': lambda: folder.parent}
    exec(cells[at], space)
    space |= dict(run=folder.name, size=32, n_trials=2, width=1/16, epochs=2, validation_fraction=.4, extractor='efficientnet_lite0', device='cpu')
    exec(next(c for c in cells[at:] if 'search_values(' in c), space)

def test_the_test_set_is_not_looked_at(films, tmp_path):
    "With test films of other people, other labels, or no test films at all, the search is the same"
    torch.set_num_threads(1)
    images, pairs = films
    pairs = pairs.assign(split=np.where(pairs.patient.isin(['p8', 'p9']), 'test', 'train'), mask_source='drawn', area=1.)
    test, rng = (pairs.split=='test').to_numpy(), np.random.default_rng(0)
    for name in ('as_is', 'permuted', 'gone'):
        table = pairs.copy()
        if name=='permuted': table.loc[test, ['pathology', 'side']] = table.loc[test, ['pathology', 'side']].to_numpy()[::-1]
        (tmp_path/name/'split').mkdir(parents=True)
        table.to_csv(tmp_path/name/'split'/'pairs.csv', index=False)
        for o, image, t in zip(pairs.itertuples(), images, test):
            if not t or name!='gone': write_png(tmp_path/name/'images'/f'{o.image}.png', rng.permuted(image) if t and name=='permuted' else image)
        run_cell(tmp_path/name)
    assert trials(tmp_path/'as_is'/'search')==trials(tmp_path/'permuted'/'search')==trials(tmp_path/'gone'/'search')

def test_validation_patients_are_in_no_training(films, tmp_path, monkeypatch):
    seen = []
    def spy(images, pairs, test, out, **more):
        seen.append((set(pairs.patient), set(test.patient), len(images)))
        for name, image in zip(test.pair, np.random.default_rng(0).integers(0, 256, (len(test), 32, 32), np.uint8)): write_png(out/'samples'/'0002'/f'{name}.png', image)
    for name in ('train_ac_gan', 'train_tac_gan'): monkeypatch.setattr(search, name, spy)
    search.search_hyperparameters(*films, tmp_path/'search', n_trials=1, **SMALL)
    assert len(seen)==2 and seen[0]==seen[1]
    trained, held, n = seen[0]
    assert not trained & held and trained | held==set(films[1].patient) and len(held)==4 and n==2*len(trained)

def test_a_training_that_breaks_down_is_no_score(films, tmp_path, monkeypatch):
    whole = search.train_ac_gan
    def breaks(*args, lr_g, **more):
        if lr_g!=search.PAPER_VALUES['lr_g']: raise FloatingPointError('the loss is no number')
        return whole(*args, lr_g=lr_g, **more)
    monkeypatch.setattr(search, 'train_ac_gan', breaks)
    table = search.search_hyperparameters(*films, tmp_path/'search', n_trials=3, **SMALL)
    assert table[table.model=='ac_gan'].mmd2.isna().tolist()==[False, True, True] and table.mmd2.notna().sum()==4
    assert json.loads((tmp_path/'search'/'best.json').read_text())['ac_gan']['trial']==0

def test_another_setting_begins_anew(films, tmp_path):
    search.search_hyperparameters(*films, tmp_path/'search', n_trials=1, **SMALL)
    before = trials(tmp_path/'search')
    search.search_hyperparameters(*films, tmp_path/'search', n_trials=1, **SMALL | {'epochs': 1})
    assert trials(tmp_path/'search')!=before==trials(tmp_path/'search-before-1')

def summary_of(rng):
    rows = [('a', k, e, 9, *rng.random(4)) for k in ('samples', 'validation') for e in range(0, 100, 10)]
    return pd.DataFrame(rows, columns=['model', 'kind', 'epoch', 'n', 'ssim', 'ms_ssim', 'mmd2', 'mmd2_paper_A'])

def test_the_choice_of_a_checkpoint_does_not_hang_on_the_test_films():
    rng = np.random.default_rng(0)
    for _ in range(20):
        s = summary_of(rng)
        other, is_test = s.copy(), s.kind=='samples'
        other.loc[is_test, 'ssim':] = rng.random((is_test.sum(), 4))
        assert selected_epoch(s, 'a')==selected_epoch(other, 'a')==s[~is_test].set_index('epoch').mmd2.idxmin()
        c = checkpoint_selection(s).set_index('metric')
        assert (c.best[['ssim', 'ms_ssim']]>=c.chosen[['ssim', 'ms_ssim']]).all() and (c.best[['mmd2', 'mmd2_paper_A']]<=c.chosen[['mmd2', 'mmd2_paper_A']]).all()

def write_toy_run(folder, seeds):
    "A run with the scores of models and the seeds that they were trained from"
    rows = [(model, metric, 10, .5, 10, .1*seed+.01*('tac' in model), 20, .4)
            for model, seed in seeds.items() for metric in ('ssim', 'mmd2')]
    columns = ['model', 'metric', 'best_epoch', 'best_score', 'selected_epoch', 'selected_score', 'last_epoch', 'last_score']
    metrics_info = {'images_hash': 'x', 'size': 180, 'extractor': 'X', 'resize': 'r', 'inpainting_models': []}
    (folder/'metrics').mkdir(parents=True)
    pd.DataFrame(rows, columns=columns).to_csv(folder/'metrics'/'checkpoint_selection.csv', index=False)
    (folder/'metrics'/'metrics.json').write_text(json.dumps(metrics_info))
    for model, seed in seeds.items():
        (folder/model).mkdir()
        (folder/model/'stage.json').write_text(json.dumps({'name': model, 'values': {'seed': seed}}))
    return folder

def test_no_ranking_below_three_seeds(tmp_path):
    two = [write_toy_run(tmp_path/f'run{i}', {'ac_gan': i, 'tac_gan': i}) for i in range(2)]
    with pytest.raises(ValueError, match='cannot be ranked by SSIM.*AC-GAN was trained from 2, TAC-GAN was trained from 2'):
        ranking(seed_table(two), 'ssim')
    same_seed = write_toy_run(tmp_path/'same_seed', {'ac_gan': 1, 'tac_gan': 1})
    with pytest.raises(ValueError, match='AC-GAN was trained from 2'):
        ranking(seed_table([*two, same_seed]), 'ssim')              # a seed that is already there does not count
    third = write_toy_run(tmp_path/'third', {'ac_gan': 2, 'tac_gan': 2})
    table = seed_table([*two, third])
    assert ranking(table, 'ssim')==['tac_gan', 'ac_gan']
    assert ranking(table, 'mmd2')==['ac_gan', 'tac_gan']
    assert np.allclose(table[table.metric=='ssim'][['mean', 'std']], [[.1, .1], [.11, .1]])
    with pytest.raises(ValueError, match='there are fewer than two models'): ranking(table, 'ssim', 'inpainting')

# Gong's overlapping Gaussians: the cells of the page, played with other signs

def gong_cells():
    cells = json.loads((ROOT/'nbs'/'3_gans/38_tac_gan.ipynb').read_text())['cells']
    at = next(i for i, c in enumerate(cells) if ''.join(c['source']).startswith('## Overlapping classes'))
    end = next(i for i, c in enumerate(cells) if i>at and ''.join(c['source']).startswith('## '))
    return [''.join(c['source']) for c in cells[at:end] if c['cell_type']=='code']

@pytest.fixture(scope='module')
def gong():
    "What the page plays with, its proof as a function, and what the AC-GAN draws"
    torch.set_num_threads(1)
    import matplotlib.pyplot as plt
    from fastcore.test import test_eq as equal
    space, cells = vars(tac_gan) | {'plt': plt, 'np': np, 'test_eq': equal}, gong_cells()
    proof = next(c for c in cells if 'assert (kept' in c)
    for c in cells:
        if c!=proof and 'found = ' not in c: exec(c, space)
    ac = space['game'](twins=False)
    def prove(tac):
        space['found'] = {'AC-GAN': ac, 'TAC-GAN': tac}
        exec(proof, space)
        plt.close('all')
    return space, prove

def test_the_signs_as_they_are_recover_the_classes(gong):
    space, prove = gong
    prove(space['game'](twins=True, seed=5))                            # four games that the page did not play

AC, CE = tac_gan.generator_losses, tac_gan.label_cross_entropy
WRONG = {'the twin helps': lambda dis, twin, fake, y, sizes: AC(dis, fake, y, sizes) | {'g_twin': CE(twin(fake), y, sizes)},
         'no twin': lambda dis, twin, fake, y, sizes: AC(dis, fake, y, sizes),
         'the head in place of the twin': lambda dis, twin, fake, y, sizes: AC(dis, fake, y, sizes) | {'g_twin': -CE(dis(fake)[1], y, sizes)},
         'labels misled': lambda dis, twin, fake, y, sizes: (lambda t: t | {'g_class': -t['g_class']})(AC(dis, fake, y, sizes)) | {'g_twin': -CE(twin(fake), y, sizes)},
         'both turned': lambda dis, twin, fake, y, sizes: (lambda t: t | {'g_class': -t['g_class']})(AC(dis, fake, y, sizes)) | {'g_twin': CE(twin(fake), y, sizes)},
         'scores turned': lambda dis, twin, fake, y, sizes: (lambda t: t | {'g_score': -t['g_score']})(AC(dis, fake, y, sizes)) | {'g_twin': -CE(twin(fake), y, sizes)}}

@pytest.mark.parametrize('name', WRONG)
def test_other_signs_do_not(gong, monkeypatch, name):
    space, prove = gong
    monkeypatch.setitem(space, 'twin_terms', WRONG[name])
    with pytest.raises(AssertionError): prove(space['game'](twins=True, steps=600))

def test_a_discriminator_that_does_not_learn_labels_is_seen(gong, monkeypatch):
    space, prove = gong
    real = space['discriminator_terms']
    monkeypatch.setitem(space, 'discriminator_terms', lambda *a, **k: (lambda t: t | {'class_real': 0*t['class_real']})(real(*a, **k)))
    with pytest.raises(AssertionError): prove(space['game'](twins=True, steps=600))
