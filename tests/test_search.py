"The search does not use the test set and resumes after a kill with the same trials; rankings require seeds; the signs of the TAC-GAN losses"
import json, sys
from pathlib import Path
import matplotlib
matplotlib.use('agg')
import numpy as np, pandas as pd
import pytest, torch
from conftest import N_KILLS, ROOT
from elbowsynth.study import ELBOW
from kills import run_with_kills
from elbowsynth.gans import search, tac_gan
from elbowsynth.data.classes import caption
from elbowsynth.data.images import write_png
from elbowsynth.report.run_summary import ranking, seed_table
from elbowsynth.evaluation.metrics import checkpoint_selection, selected_epoch
from elbowsynth.phantom.phantom import phantom
from elbowsynth.training import DamagedFile, lock_training

# What the first optimizer and the first study import takes seconds: once for all runs that `kills` forks
if Path(sys.argv[0]).name=='kills.py':
    import torch._dynamo                                            # noqa: F401
    import optuna                                                   # noqa: F401

SMALL = dict(validation_fraction=.4, epochs=2, width=1/16, extractor='efficientnet_lite0', device='cpu')

@pytest.fixture(scope='module')
def dataset():
    "Images and pairs of ten patients, one AP and one LAT image each"
    rows = [(f'f{i}_{view}', f'p{i}', view, 'LR'[i%2], ['normal', 'joint effusion'][i%3>0]) for i in range(10) for view in ('AP', 'LAT')]
    pairs = pd.DataFrame(rows, columns=['image', 'patient', 'view', 'side', 'pathology'])
    pairs['pair'] = [f'{p.image}__{p.pathology.replace(" ", "_")}' for p in pairs.itertuples()]
    pairs['caption'] = [caption(p.view, [p.pathology]) for p in pairs.itertuples()]
    images = [phantom(p.view, [p.pathology], side=p.side, age=10, seed=i, size=96).image for i,p in enumerate(pairs.itertuples())]
    return np.stack(images)[:, ::3, ::3], pairs

def read_trials(out): return (out/'trials.csv').read_bytes()

@pytest.mark.long('several searches, 30 s')
def test_the_same_seed_gives_the_same_trials(dataset, tmp_path):
    torch.set_num_threads(1)
    for name,seed in (('one', 0), ('two', 0), ('other', 1)):
        search.search_hyperparameters(*dataset, tmp_path/name, n_trials=2, seed=seed, **SMALL)
    assert read_trials(tmp_path/'one')==read_trials(tmp_path/'two')!=read_trials(tmp_path/'other')
    lines = (tmp_path/'one'/'journal.jsonl').read_text().splitlines()
    assert sum('params' in json.loads(line) for line in lines)==4               # plain JSON with finished trials only

def noisy_dataset():
    "Ten patients with images of noise, which need no phantom"
    rows = [(f'f{i}', f'p{i}', ['AP', 'LAT'][i%2], 'LR'[i%2], ['normal', 'joint effusion'][i%3>0]) for i in range(10)]
    pairs = pd.DataFrame(rows, columns=['pair', 'patient', 'view', 'side', 'pathology'])
    return np.random.default_rng(0).integers(256, size=(10, 32, 32), dtype=np.uint8), pairs

def means_of_rows(images, *_): return np.asarray(images).mean(2)

def search_quickly(out, **settings):
    "A small search with the means of rows for features"
    search.features = means_of_rows
    options = dict(n_trials=2, validation_fraction=.4, epochs=1, width=1/32, extractor='efficientnet_lite0', device='cpu')
    search.search_hyperparameters(*noisy_dataset(), out, **options | settings)

def check_kills(folder, n_kills, seed=0):
    "The journal has times and numbers of processes; what it holds is in `trials.csv`"
    differing = run_with_kills('test_search:search_quickly', folder, n_kills, seed)
    assert len(differing)==n_kills
    unexpected = {k: set(v)-{'out/journal.jsonl'} for k,v in differing.items()}
    assert not any(unexpected.values()), unexpected
    for journal in folder.glob('kill-*/out/journal.jsonl'):
        assert sum('params' in json.loads(line) for line in journal.read_text().splitlines())==4

@pytest.mark.long('two searches, 10 s')
def test_a_search_killed_at_file_operations_ends_with_the_same_files(tmp_path): check_kills(tmp_path, 2)

@pytest.mark.long('searches')
def test_many_kills_of_a_search(tmp_path): check_kills(tmp_path, N_KILLS, seed=1)

def test_a_search_says_where_it_starts_and_is_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, 'features', means_of_rows)
    out = tmp_path/'out'
    search_quickly(out, n_trials=1)
    assert 'ac_gan: starts at trial 0 of 1 (no trials yet)' in capsys.readouterr().out
    with (out/'journal.jsonl').open('a') as f: f.write('{"op_code":4,"worker_id"')
    for name in ('journal.jsonl.lock', 'journal.jsonl.lock-1.rename', '.part-trials.csv'): (out/name).touch()
    search_quickly(out)
    assert 'ac_gan: resumes at trial 1 of 2' in capsys.readouterr().out
    assert not [p.name for p in out.iterdir() if 'lock' in p.name or p.name.startswith('.')]
    search_quickly(out, seed=1, n_trials=1)
    assert 'ac_gan: starts at trial 0 of 1 (seed was 0, is 1)' in capsys.readouterr().out
    with lock_training(out), pytest.raises(RuntimeError, match='fix: wait'): search_quickly(out)
    (out/'journal.jsonl').write_text('{}\nnot JSON\n')
    with pytest.raises(DamagedFile, match='line 2 of journal.jsonl is no JSON'): search_quickly(out, seed=1)

def test_each_trial_trains_with_its_hyperparameters_and_the_settings_of_the_search(tmp_path, monkeypatch):
    calls = []
    def fake_training(model):
        def train(images, pairs, test, out, **settings):
            calls.append((model, settings))
            samples = np.random.default_rng(len(calls)).integers(256, size=(len(test), 32, 32), dtype=np.uint8)
            for name,image in zip(test.pair, samples): write_png(out/'samples'/'0007'/f'{name}.png', image)
        return train
    for model in ('ac_gan', 'tac_gan'): monkeypatch.setattr(search, f'train_{model}', fake_training(model))
    monkeypatch.setattr(search, 'features', means_of_rows)
    fields = {'view': ['AP', 'LAT'], 'pathology': ['normal', 'joint effusion']}
    search_quickly(tmp_path/'out', n_trials=3, epochs=7, width=1/8, label_fields=fields, n_labels=4, seed=5)
    expected = {'epochs': 7, 'checkpoint_every': 7, 'width': 1/8, 'label_fields': fields, 'n_labels': 4, 'seed': 5, 'device': 'cpu', 'study': ELBOW}
    table = pd.read_csv(tmp_path/'out'/'trials.csv')
    assert table.model.tolist()==[model for model,_ in calls]==['ac_gan']*3+['tac_gan']*3
    for trial,(_,settings) in zip(table.to_dict('records'), calls):
        assert {k: settings[k] for k in expected}==expected and len(settings)==len(expected)+6
        assert settings['betas']==pytest.approx([trial['beta1'], .999], rel=1e-5)
        for name in ('lr_g', 'lr_d', 'lr_classifier', 'dropout', 'batch_size'): assert settings[name]==pytest.approx(trial[name], rel=1e-5)
    for first in (0, 3): assert table.loc[first, list(search.PAPER_VALUES)].to_dict()==search.PAPER_VALUES
    assert table.lr_g.nunique()>2
    best = json.loads((tmp_path/'out'/'best_hyperparameters.json').read_text())
    for model,trials in table.groupby('model'):
        top = trials.sort_values('mmd2').iloc[0]
        found = best[model]
        assert found['trial']==top.trial and found['mmd2']==pytest.approx(top.mmd2, rel=1e-4)
        assert found['paper_values_mmd2']==pytest.approx(trials.mmd2.iloc[0], rel=1e-4)
        for name in ('lr_g', 'lr_d', 'lr_classifier', 'dropout', 'batch_size'): assert found['hyperparameters'][name]==pytest.approx(top[name], rel=1e-4)
        assert found['hyperparameters']['betas']==pytest.approx([top.beta1, .999], rel=1e-4)

def run_search_cell(folder):
    "Run the cell of the stage notebook that searches, with its parameters"
    notebook = json.loads((ROOT/'nbs'/'3_gans/39_search.ipynb').read_text())
    cells = [''.join(c['source']) for c in notebook['cells'] if c['cell_type']=='code']
    parameters = next(i for i,cell in enumerate(cells) if cell.startswith('run: str'))
    from elbowsynth.data.labels import read_pairs
    from elbowsynth.study import read_study
    namespace = vars(search) | {'read_pairs': read_pairs, 'read_study': read_study, 'root': lambda: folder.parent}
    exec(cells[parameters], namespace)
    namespace |= dict(run=folder.name, size=32, n_trials=2, **SMALL)
    exec(next(cell for cell in cells[parameters:] if 'search_hyperparameters(' in cell), namespace)

def test_the_test_set_is_not_used(dataset, tmp_path):
    "With other test images and labels, or no test images at all, the search is the same"
    torch.set_num_threads(1)
    images,pairs = dataset
    subset = np.where(pairs.patient.isin(['p8', 'p9']), 'test', 'train')
    pairs = pairs.assign(split=subset, mask_source='annotated', mask_area=1.)
    is_test = subset=='test'
    rng = np.random.default_rng(0)
    for name in ('as_is', 'permuted', 'missing'):
        table = pairs.copy()
        if name=='permuted':
            columns = ['pathology', 'side']
            table.loc[is_test, columns] = table.loc[is_test, columns].to_numpy()[::-1]
        (tmp_path/name/'split').mkdir(parents=True)
        table.to_csv(tmp_path/name/'split'/'pairs.csv', index=False)
        for p,image,in_test in zip(pairs.itertuples(), images, is_test):
            if in_test and name=='missing': continue
            if in_test and name=='permuted': image = rng.permuted(image)
            write_png(tmp_path/name/'images'/f'{p.image}.png', image)
        run_search_cell(tmp_path/name)
    as_is = read_trials(tmp_path/'as_is'/'search')
    assert as_is==read_trials(tmp_path/'permuted'/'search')==read_trials(tmp_path/'missing'/'search')

def test_validation_patients_are_in_no_training(dataset, tmp_path, monkeypatch):
    calls = []
    def fake_training(images, pairs, test, out, **settings):
        calls.append((set(pairs.patient), set(test.patient), len(images)))
        samples = np.random.default_rng(0).integers(0, 256, (len(test), 32, 32), np.uint8)
        for name,image in zip(test.pair, samples): write_png(out/'samples'/'0002'/f'{name}.png', image)
    for name in ('train_ac_gan', 'train_tac_gan'): monkeypatch.setattr(search, name, fake_training)
    search.search_hyperparameters(*dataset, tmp_path/'search', n_trials=1, **SMALL)
    assert len(calls)==2 and calls[0]==calls[1]
    trained,held_out,n_images = calls[0]
    assert not trained & held_out and trained | held_out==set(dataset[1].patient)
    assert len(held_out)==4 and n_images==2*len(trained)

def test_a_diverged_training_has_no_score(dataset, tmp_path, monkeypatch):
    train_ac_gan = search.train_ac_gan
    def diverges(*args, lr_g, **settings):
        if lr_g!=search.PAPER_VALUES['lr_g']: raise FloatingPointError('loss is NaN')
        return train_ac_gan(*args, lr_g=lr_g, **settings)
    monkeypatch.setattr(search, 'train_ac_gan', diverges)
    table = search.search_hyperparameters(*dataset, tmp_path/'search', n_trials=3, **SMALL)
    assert table[table.model=='ac_gan'].mmd2.isna().tolist()==[False, True, True] and table.mmd2.notna().sum()==4
    best = json.loads((tmp_path/'search'/'best_hyperparameters.json').read_text())
    assert best['ac_gan']['trial']==0

def test_another_setting_starts_anew(dataset, tmp_path):
    search.search_hyperparameters(*dataset, tmp_path/'search', n_trials=1, **SMALL)
    before = read_trials(tmp_path/'search')
    search.search_hyperparameters(*dataset, tmp_path/'search', n_trials=1, **SMALL | {'epochs': 1})
    assert read_trials(tmp_path/'search')!=before==read_trials(tmp_path/'search-previous-1')

def random_summary(rng):
    rows = [('a', source, epoch, 9, *rng.random(4)) for source in ('samples', 'validation') for epoch in range(10, 110, 10)]
    return pd.DataFrame(rows, columns=['model', 'source', 'epoch', 'n_pairs', 'ssim', 'ms_ssim', 'mmd2', 'mmd2_paper_unit_sigma10'])

def test_the_selected_checkpoint_does_not_depend_on_the_test_images():
    rng = np.random.default_rng(0)
    for _ in range(20):
        summary = random_summary(rng)
        is_test = summary.source=='samples'
        other = summary.copy()
        other.loc[is_test, 'ssim':] = rng.random((is_test.sum(), 4))
        by_validation = summary[~is_test].set_index('epoch').mmd2.idxmin()
        assert selected_epoch(summary, 'a')==selected_epoch(other, 'a')==by_validation
        selection = checkpoint_selection(summary).set_index('metric')
        similarities,distances = ['ssim', 'ms_ssim'], ['mmd2', 'mmd2_paper_unit_sigma10']
        assert (selection.best_score[similarities]>=selection.selected_score[similarities]).all()
        assert (selection.best_score[distances]<=selection.selected_score[distances]).all()

def write_run(folder, seeds):
    "The files of a run that a table of seeds reads; `seeds` is model to seed"
    rows = [(model, metric, 10, .5, 10, .1*seed+.01*('tac' in model), 20, .4) for model,seed in seeds.items() for metric in ('ssim', 'mmd2')]
    columns = ['model', 'metric', 'best_epoch', 'best_score', 'selected_epoch', 'selected_score', 'last_epoch', 'last_score']
    (folder/'metrics').mkdir(parents=True)
    pd.DataFrame(rows, columns=columns).to_csv(folder/'metrics'/'checkpoint_selection.csv', index=False)
    facts = {'images_hash': 'x', 'size': 180, 'extractor': 'X', 'resize': 'r', 'inpainting_models': []}
    (folder/'metrics'/'metrics.json').write_text(json.dumps(facts))
    for model,seed in seeds.items():
        (folder/model).mkdir()
        (folder/model/'stage.json').write_text(json.dumps({'name': model, 'values': {'seed': seed}}))
    return folder

def test_no_ranking_below_three_seeds(tmp_path):
    two = [write_run(tmp_path/f'r{i}', {'ac_gan': i, 'tac_gan': i}) for i in range(2)]
    with pytest.raises(ValueError, match='cannot be ranked by SSIM.*AC-GAN was trained from 2, TAC-GAN was trained from 2'): ranking(seed_table(two), 'ssim')
    again = write_run(tmp_path/'again', {'ac_gan': 1, 'tac_gan': 1})
    with pytest.raises(ValueError, match='AC-GAN was trained from 2'): ranking(seed_table([*two, again]), 'ssim')       # a repeated seed is not a third
    third = write_run(tmp_path/'third', {'ac_gan': 2, 'tac_gan': 2})
    table = seed_table([*two, third])
    assert ranking(table, 'ssim')==['tac_gan', 'ac_gan'] and ranking(table, 'mmd2')==['ac_gan', 'tac_gan']
    assert np.allclose(table[table.metric=='ssim'][['mean', 'std']], [[.1, .1], [.11, .1]])
    with pytest.raises(ValueError, match='there are fewer than two models'): ranking(table, 'ssim', 'inpainting')

# Gong's overlapping Gaussians: the cells of the notebook, run with other signs

def gaussian_cells():
    notebook = json.loads((ROOT/'nbs'/'3_gans/38_tac_gan.ipynb').read_text())
    cells = [(c['cell_type'], ''.join(c['source'])) for c in notebook['cells']]
    start = next(i for i,(_,source) in enumerate(cells) if source.startswith('## Overlapping classes'))
    end = next(i for i,(_,source) in enumerate(cells) if i>start and source.startswith('## '))
    return [source for kind,source in cells[start:end] if kind=='code']

@pytest.fixture(scope='module')
def gaussians():
    "The namespace of these cells, and a function that runs the assertions of the notebook on generated numbers of a TAC-GAN"
    torch.set_num_threads(1)
    import matplotlib.pyplot as plt
    from fastcore.test import test_eq as assert_equal
    from elbowsynth.gans import gan
    namespace = vars(gan) | vars(tac_gan) | {'plt': plt, 'np': np, 'test_eq': assert_equal}
    cells = gaussian_cells()
    assertions = next(cell for cell in cells if 'assert (tac_width' in cell)
    for cell in cells:
        if cell!=assertions and not cell.startswith('generated = '): exec(cell, namespace)
    of_ac_gan = namespace['train_on_numbers'](with_twin=False)
    def check(of_tac_gan):
        namespace['generated'] = {'AC-GAN': of_ac_gan, 'TAC-GAN': of_tac_gan}
        exec(assertions, namespace)
        plt.close('all')
    return namespace, check

@pytest.mark.long('trains a TAC-GAN on numbers, 15 s')
def test_the_right_signs_reproduce_the_classes(gaussians):
    namespace,check = gaussians
    check(namespace['train_on_numbers'](with_twin=True, seed=5))        # four experiments that the notebook does not run

def helpful_twin(dis, twin, fake, y, field_sizes):
    losses = tac_gan.generator_losses(dis, fake, y, field_sizes)
    return losses | {'g_twin': tac_gan.label_cross_entropy(twin(fake), y, field_sizes)}

def no_twin(dis, twin, fake, y, field_sizes):
    return tac_gan.generator_losses(dis, fake, y, field_sizes)

def class_head_as_twin(dis, twin, fake, y, field_sizes):
    losses = tac_gan.generator_losses(dis, fake, y, field_sizes)
    return losses | {'g_twin': -tac_gan.label_cross_entropy(dis(fake)[1], y, field_sizes)}

def reversed_class_loss(dis, twin, fake, y, field_sizes):
    losses = tac_gan.generator_losses(dis, fake, y, field_sizes)
    return losses | {'g_class': -losses['g_class'], 'g_twin': -tac_gan.label_cross_entropy(twin(fake), y, field_sizes)}

def reversed_class_loss_and_twin(dis, twin, fake, y, field_sizes):
    losses = tac_gan.generator_losses(dis, fake, y, field_sizes)
    return losses | {'g_class': -losses['g_class'], 'g_twin': tac_gan.label_cross_entropy(twin(fake), y, field_sizes)}

def reversed_adversarial_loss(dis, twin, fake, y, field_sizes):
    losses = tac_gan.generator_losses(dis, fake, y, field_sizes)
    return losses | {'g_adv': -losses['g_adv'], 'g_twin': -tac_gan.label_cross_entropy(twin(fake), y, field_sizes)}

WRONG_LOSSES = [helpful_twin, no_twin, class_head_as_twin, reversed_class_loss, reversed_class_loss_and_twin, reversed_adversarial_loss]

QUICK = [no_twin, class_head_as_twin]

@pytest.mark.parametrize('wrong_losses', [f if f in QUICK else pytest.param(f, marks=pytest.mark.long('10 s each')) for f in WRONG_LOSSES])
def test_wrong_signs_do_not(gaussians, monkeypatch, wrong_losses):
    namespace,check = gaussians
    monkeypatch.setitem(namespace, 'tac_generator_losses', wrong_losses)
    with pytest.raises(AssertionError): check(namespace['train_on_numbers'](with_twin=True, steps=600))

def test_a_discriminator_that_is_not_trained_on_labels_is_detected(gaussians, monkeypatch):
    namespace,check = gaussians
    discriminator_losses = namespace['discriminator_losses']
    def without_class_loss(*args, **kwargs):
        losses = discriminator_losses(*args, **kwargs)
        return losses | {'d_class_real': 0*losses['d_class_real']}
    monkeypatch.setitem(namespace, 'discriminator_losses', without_class_loss)
    with pytest.raises(AssertionError): check(namespace['train_on_numbers'](with_twin=True, steps=600))
