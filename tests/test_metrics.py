"""Second opinions on the metrics: piq, torchmetrics, scikit-image and scikit-learn on hard inputs, and what a stage that scores must survive."""
import json, os, shutil, subprocess, sys, textwrap
import cv2, numpy as np, pandas as pd, piq, pytest, torch
import torchmetrics.functional.image as tm
from conftest import sh
from skimage.metrics import structural_similarity
from sklearn.metrics.pairwise import pairwise_distances, polynomial_kernel, rbf_kernel
from elbowsynth.evaluation import metrics
from elbowsynth.data.images import write_png
from elbowsynth.evaluation.extractors import cached_features, features, state_dict
from elbowsynth.evaluation.baselines import load_autoencoders, region_masks, vae_reconstruct
from elbowsynth.evaluation.mmd import kernel_sums, kid, mmd2, MMD_CONVENTIONS, prdc, vendi
from elbowsynth.evaluation.ssim import (
    combine_scales, ms_ssim, MS_SSIM_CONVENTIONS, pair_scores, scale_statistics, ssim,
    SSIM_CONVENTIONS, ssim_maps)
from elbowsynth.evaluation.metrics import score_run
from elbowsynth.evaluation.run_statistics import run_statistics

LITE = 'efficientnet_lite0'

def hard_pairs(h, w):
    "Random, constant, inverted and extreme films, each with a partner"
    rng = np.random.default_rng(h*1000+w)
    x, smooth = rng.random((2, h, w))
    smooth = cv2.GaussianBlur(smooth, (0, 0), 4)
    smooth = (smooth-smooth.min())/np.ptp(smooth)
    white, black, board = np.ones((h, w)), np.zeros((h, w)), np.indices((h, w)).sum(0)%2/1.
    return {'random': (x, rng.random((h, w))), 'like': (smooth, np.clip(smooth+rng.normal(0, .05, (h, w)), 0, 1)), 'inverted': (smooth, 1-smooth), 'constant': (.3*white, .6*white),
            'white and black': (white, black), 'black and black': (black, black), 'white and random': (white, x), 'board and its negative': (board, 1-board),
            'binary': ((x>.5)/1., (smooth>.5)/1.), 'faint': (1e-3*x, 1e-3*smooth), 'nearly white': (1-1e-3*x, white)}

def stacks(h, w, dtype): return [np.stack(v).astype(dtype) for v in zip(*hard_pairs(h, w).values())]

LIBRARIES = {'piq': lambda x,y: piq.ssim(x, y, reduction='none'), 'piq_full': lambda x,y: piq.ssim(x, y, downsample=False, reduction='none'),
             'torchmetrics': lambda x,y: tm.structural_similarity_index_measure(x, y, data_range=1., reduction='none'),
             'skimage': lambda x,y: np.array([structural_similarity(a, b, data_range=1) for a,b in zip(x[:, 0].numpy(), y[:, 0].numpy())]),
             'wang': lambda x,y: np.array([structural_similarity(a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
                                           for a,b in zip(x[:, 0].numpy(), y[:, 0].numpy())])}
LIBRARIES_MS = {'piq': lambda x,y: piq.multi_scale_ssim(x, y, reduction='none'),
                'torchmetrics': lambda x,y: tm.multiscale_structural_similarity_index_measure(x, y, data_range=1., reduction='none')}

@pytest.mark.parametrize('h,w', [(64, 64), (97, 131), (400, 391)])
@pytest.mark.parametrize('convention', LIBRARIES)
def test_ssim_is_that_of_its_library(convention, h, w):
    x,y = stacks(h, w, float)
    theirs = np.asarray(LIBRARIES[convention](*(torch.tensor(o)[:, None] for o in (x, y))))
    assert np.abs(ssim(x, y, convention=convention)-theirs).max()<1e-5
    assert np.abs(ssim(x.astype(np.float32), y.astype(np.float32), convention=convention)-theirs).max()<1e-4

@pytest.mark.parametrize('h,w', [(161, 161), (161, 230), (177, 176), (256, 311)])
@pytest.mark.parametrize('convention', LIBRARIES_MS)
def test_ms_ssim_is_that_of_its_library(convention, h, w):
    x,y = stacks(h, w, float)
    least = MS_SSIM_CONVENTIONS[convention]['smallest']
    if min(h, w)<least:
        with pytest.raises(ValueError, match=f'at least {least} a side'): ms_ssim(x, y, convention=convention)
        with pytest.raises(ValueError): LIBRARIES_MS[convention](*(torch.tensor(o)[:, None] for o in (x, y)))
        return
    theirs = LIBRARIES_MS[convention](*(torch.tensor(o)[:, None] for o in (x, y))).numpy()
    assert np.abs(ms_ssim(x, y, convention=convention)-theirs).max()<1e-5
    single = LIBRARIES_MS[convention](*(torch.tensor(o, dtype=torch.float32)[:, None] for o in (x, y))).numpy()
    off = np.abs(ms_ssim(x.astype(np.float32), y.astype(np.float32), convention=convention)-theirs)
    assert (off<np.maximum(1e-4, 2*np.abs(single-theirs))).all(), off          # where a factor is next to zero, float32 is no better in the library

@pytest.mark.parametrize('shape', [(1, 160, 400), (1, 400, 160)])
def test_ms_ssim_below_161_is_an_error_in_both(shape):
    x = np.random.default_rng(0).random(shape)
    with pytest.raises(ValueError, match='too small: the windows want at least 161'): ms_ssim(x, x)
    with pytest.raises(ValueError): piq.multi_scale_ssim(*[torch.tensor(x)[:, None]]*2)

@pytest.mark.parametrize('convention', SSIM_CONVENTIONS)
def test_a_mask_of_ones_is_no_mask(convention):
    x,y = stacks(300, 331, float)
    assert np.abs(ssim(x, y, np.ones_like(x), convention)-ssim(x, y, convention=convention)).max()<1e-9
    assert np.abs(ssim(x, y, .3*np.ones_like(x), convention)-ssim(x, y, convention=convention)).max()<1e-9

@pytest.mark.parametrize('convention', MS_SSIM_CONVENTIONS)
def test_a_mask_of_ones_is_no_mask_at_five_scales(convention):
    x,y = stacks(193, 200, float)
    assert np.abs(ms_ssim(x, y, np.ones_like(x), convention)-ms_ssim(x, y, convention=convention)).max()<1e-9

def test_a_mask_is_a_crop():
    "SSIM under a box is SSIM of the part that the box's windows see"
    x,y = (o[1:2] for o in stacks(120, 140, float))
    m = np.zeros_like(x)
    m[:, 30:80, 40:100] = 1
    assert abs(ssim(x, y, m, 'piq_full')[0]-ssim(x[:, 25:85, 35:105], y[:, 25:85, 35:105], convention='piq_full')[0])<1e-9

def test_sums_of_shifted_tensors_are_those_of_opencv():
    "What a GPU would run, on the CPU"
    x,y = stacks(193, 200, float)
    tx,ty = torch.tensor(x), torch.tensor(y)
    for o in SSIM_CONVENTIONS.values():
        ours = np.stack([ssim_maps(a, b, o['window'], o['reflect'], o['sample'])[0].mean() for a,b in zip(x, y)])
        assert np.abs(ssim_maps(tx, ty, o['window'], o['reflect'], o['sample'])[0].mean((1, 2)).numpy()-ours).max()<1e-9
    for o in MS_SSIM_CONVENTIONS.values():
        m = np.random.default_rng(0).random(x.shape)
        planes = np.stack([scale_statistics(a, b, [c], o) for a,b,c in zip(x, y, m)])
        assert np.abs(scale_statistics(tx, ty, [torch.tensor(m)], o).numpy()-planes).max()<1e-9
    masks = {'half': (np.arange(200)<100)*np.ones_like(x)}
    meta = metrics.map_pairs
    on_cpu = pair_scores(x, y, masks)
    try:                                                            # the branch of a GPU, with its stacks left where they are
        metrics.map_pairs = lambda f,s,device='cpu',batch=4: np.concatenate([f(*(o[i:i+batch] for o in s)).numpy() for i in range(0, len(s[0]), batch)])
        stacked = pair_scores(x, y, masks)
    finally: metrics.map_pairs = meta
    pd.testing.assert_frame_equal(on_cpu, stacked, atol=1e-9, rtol=0)

def test_a_negative_scale_counts_as_zero():
    x,y = (o[2:3] for o in stacks(200, 200, float))                 # inverted
    assert ms_ssim(x, y)[0]==0 and ssim(x, y)[0]<0
    assert combine_scales(np.array([1., 1, 1, 1, 1]))==1

@pytest.mark.parametrize('spoil,words', [(lambda a: a*255, 'film 2 of y reaches from 0'), (lambda a: a-.5, 'film 2 of y reaches from -0.5'), (lambda a: a*np.nan, 'film 2 of y holds NaN')])
def test_the_message_names_the_film(spoil, words):
    x = np.random.default_rng(0).random((4, 170, 170))
    y = x.copy()
    x[2, 0, :2] = y[2, 0, :2] = 0, 1
    y[2] = spoil(y[2])
    for f in ssim, ms_ssim, pair_scores:
        with pytest.raises(ValueError, match=words): f(x, y)
    with pytest.raises(ValueError, match=words.replace(' of y', ' of images')): features(y, LITE)

def test_shapes_and_counts():
    x = np.random.default_rng(0).random((4, 170, 170))
    with pytest.raises(ValueError, match=r'wants films as \(n, h, w\)'): ssim(x[:, None], x[:, None])
    with pytest.raises(ValueError, match='x holds 4 films of 170x170 pixels, y holds 3'): ssim(x, x[:3])
    with pytest.raises(ValueError, match='x holds 4 films of 170x170 pixels, y holds 4 of 170x160'): ms_ssim(x, x[..., :160])
    with pytest.raises(ValueError, match='mask is'): ssim(x, x, np.ones((3, 170, 170)))
    with pytest.raises(ValueError, match='mask 3 is empty'): ssim(x, x, np.stack([*np.ones((3, 170, 170)), np.zeros((170, 170))]))
    with pytest.raises(ValueError, match="unknown convention 'x'"): mmd2(x[:, 0], x[:, 0], 'x')

def vectors(m, n, d=40):
    rng = np.random.default_rng(m+n)
    return np.maximum(rng.normal(1, 1, (m, d)), 0), np.maximum(rng.normal(1.2, .8, (n, d)), 0)

def mmd_by_sklearn(fx, fy, convention):
    unit = lambda f: f/np.linalg.norm(f, axis=1, keepdims=True)
    if convention=='paper_A': fx,fy = unit(fx), unit(fy)
    dist = pairwise_distances(fx)
    gamma = {'paper_A': 1/200, 'paper_B': None, 'median': 1/(2*np.median(dist[~np.eye(len(fx), dtype=bool)])**2)}.get(convention)
    k = (lambda a,b: polynomial_kernel(a, b, degree=3)) if convention=='KID' else (lambda a,b: rbf_kernel(a, b, gamma=gamma))
    if convention=='multi_bandwidth':
        z = pairwise_distances(np.concatenate((fx, fy)))**2
        s = z.sum()/(len(z)**2-len(z))
        k = lambda a,b: sum(np.exp(-pairwise_distances(a, b)**2/(s/4*2**i)) for i in range(5))
    xx,yy,xy = k(fx, fx), k(fy, fy), k(fx, fy)
    off = lambda m: (m.sum()-np.trace(m))/(len(m)*(len(m)-1))
    return off(xx)+off(yy)-2*xy.mean() if MMD_CONVENTIONS[convention]['unbiased'] else xx.mean()+yy.mean()-2*xy.mean()

@pytest.mark.parametrize('m,n', [(30, 30), (50, 23)])
@pytest.mark.parametrize('convention', MMD_CONVENTIONS)
def test_mmd_is_that_of_sklearn(convention, m, n):
    fx,fy = vectors(m, n)
    theirs = mmd_by_sklearn(fx, fy, convention)
    assert abs(mmd2(fx, fy, convention)-theirs)<1e-9
    assert abs(mmd2(fx.astype(np.float32), fy.astype(np.float32), convention)-theirs)<1e-4*max(1, abs(theirs))
    assert mmd2(fx, fx, convention)<=1e-12
    if convention!='KID': assert abs(mmd2(100+fx, 100+fy, convention)-theirs)<1e-9 or convention=='paper_A'

def test_kernel_sums_leave_nothing_out():
    fx,fy = vectors(41, 30)
    for c in MMD_CONVENTIONS:
        a, b = kernel_sums(fx, fy, c), kernel_sums(fx, fy, c, block_size=8)
        for k in a: assert np.allclose(a[k], b[k], atol=1e-9)
        assert np.isclose(a['xy'].sum(), a['yx'].sum())

def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd
    fx,fy = vectors(60, 60)
    assert abs(kid(fx, fy)-float(poly_mmd(torch.tensor(fx), torch.tensor(fy))))<1e-6
    assert np.isfinite(kid(fx[:9], fy, subset_size=1000, n_subsets=3))     # where torchmetrics stops: a subset larger than the set

def test_prdc_by_brute_force():
    from sklearn.neighbors import NearestNeighbors
    fx,fy = vectors(70, 55, 4)
    k = 5
    radius = lambda f: NearestNeighbors(n_neighbors=k+1).fit(f).kneighbors(f)[0][:, k]
    d, rx, ry = pairwise_distances(fx, fy), radius(fx), radius(fy)
    inside = d<rx[:, None]
    theirs = {'precision': inside.any(0).mean(), 'recall': (d<ry).any(1).mean(), 'density': inside.sum(0).mean()/k, 'coverage': inside.any(1).mean()}
    for block in 2048, 16: assert prdc(fx, fy, k, block)==pytest.approx(theirs)

def test_vendi_by_the_matrix():
    fx,_ = vectors(30, 30)
    for f in fx, fx[:, :7]+.01:
        u = f/np.linalg.norm(f, axis=1, keepdims=True)
        v = np.linalg.eigvalsh(u@u.T/len(u))
        v = v[v>1e-12]
        assert vendi(f)==pytest.approx(np.exp(-(v*np.log(v)).sum()), rel=1e-6)

def test_nothing_that_can_execute_is_loaded(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'sprung'),)
    torch.save({'fc.bias': Trap()}, tmp_path/'trap.pth')
    with pytest.raises(ValueError, match='without executing'): state_dict(tmp_path/'trap.pth')
    assert not (tmp_path/'sprung').exists()

def test_weights_that_cannot_be_had_are_an_error(monkeypatch):
    from torchvision.models import ResNet50_Weights
    def fail(*a, **k): raise OSError('no network')
    monkeypatch.setattr(type(ResNet50_Weights.IMAGENET1K_V2), 'get_state_dict', fail)
    with pytest.raises(OSError, match='resnet50:FILE'): metrics.features(np.zeros((1, 32, 32)), 'resnet50')

def test_vectors_are_kept_by_content(tmp_path):
    films = np.random.default_rng(0).integers(0, 256, (2, 40, 40), np.uint8)
    first = cached_features(films, LITE, tmp_path)
    paths = sorted(tmp_path.iterdir())
    np.save(paths[0], np.zeros(1280, np.float32))                   # whoever is kept is believed
    assert (cached_features(films, LITE, tmp_path)==0).all(1).sum()==1
    assert len(set(tmp_path.iterdir()))==2
    cached_features(films[:, :39], LITE, tmp_path)
    assert len(set(tmp_path.iterdir()))==4 and first.shape==(2, 1280)

def test_an_autoencoder_of_diffusers_goes_there_and_back(tmp_path):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4, 4), down_block_types=['DownEncoderBlock2D']*2, up_block_types=['UpDecoderBlock2D']*2, norm_num_groups=2).save_pretrained(tmp_path/'base'/'vae')
    vae = load_autoencoders([f'toy={tmp_path}/base'], 'cpu')['toy']
    films, white = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32), np.uint8)
    back = vae_reconstruct(films, vae, white)
    assert (back==vae_reconstruct(films, vae, white)).all() and (back[white<=127]==films[white<=127]).all() and (back!=films).any()

def test_the_autoencoder_of_a_base_that_was_fetched_is_found_by_name(tmp_path):
    from diffusers import AutoencoderKL
    kept = tmp_path/'hub'/'models--some--base'                       # as the hub's library keeps what it fetched
    AutoencoderKL(block_out_channels=(4, 4), down_block_types=['DownEncoderBlock2D']*2, up_block_types=['UpDecoderBlock2D']*2, norm_num_groups=2).save_pretrained(kept/'snapshots'/('0'*40)/'vae')
    (kept/'refs').mkdir()
    (kept/'refs'/'main').write_text('0'*40)
    ask = "from elbowsynth.evaluation.baselines import load_autoencoders; print(load_autoencoders(['toy=some/{}'], 'cpu'))"
    assert 'AutoencoderKL' in sh(sys.executable, '-c', ask.format('base'), HF_HUB_CACHE=str(tmp_path/'hub')).stdout
    refused = sh(sys.executable, '-c', ask.format('other'), check=False, HF_HUB_CACHE=str(tmp_path/'hub')).stderr
    assert "autoencoder 'toy=some/other'" in refused and 'Write NAME=BASE' in refused

def run_folder(folder, n=20, size=176):
    "A run with one GAN and one inpainting model"
    rng = np.random.default_rng(0)
    smooth = lambda: (255*cv2.normalize(cv2.GaussianBlur(rng.random((size, size)), (0, 0), 6), None, 0, 1, cv2.NORM_MINMAX)).astype(np.uint8)
    rows, white = [], np.zeros((size, size), np.uint8)
    white[60:120, 50:130] = 255
    for i in range(2*n):
        pair = {'pair': f'f{i}__normal', 'image': f'f{i}', 'patient': f'p{i//2}', 'view': ('AP', 'LAT')[i%2], 'pathology': 'normal', 'split': 'test' if i<n else 'train'}
        rows.append(pair)
        film = smooth()
        write_png(folder/'images'/f'{pair["image"]}.png', film)
        if i>=n: continue
        write_png(folder/'masks'/f'{pair["pair"]}.png', white)
        write_png(folder/'gan'/'samples'/'0010'/f'{pair["pair"]}.png', smooth()[::4, ::4].copy())
        drawn = smooth()
        write_png(folder/'flux'/'raw'/'0010'/f'{pair["pair"]}.png', drawn)
        write_png(folder/'flux'/'samples'/'0010'/f'{pair["pair"]}.png', np.where(white>0, drawn, film))
    (folder/'split').mkdir()
    pd.DataFrame(rows).to_csv(folder/'split'/'pairs.csv', index=False)
    return folder

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp('run'))
    score_run(folder, ['gan', 'flux'], size=176, extractor=LITE, device='cpu', statistics=run_statistics)
    return folder

def test_every_number_says_how_it_came_about(run):
    tables = {p.stem: pd.read_csv(p) for p in (run/'metrics').glob('*.csv')}
    assert set(tables)=={'scores', 'summary', 'best', 'choice', 'floors', 'regions', 'sets', 'groups', 'enlarge', 'intervals', 'tests', 'trends', 'mmd', 'variety'}
    tables |= {p.name: pd.read_csv(p) for p in (run/'metrics'/'epochs').glob('*.csv')}
    for name,t in tables.items():
        assert len(t) and t[['convention', 'estimator', 'extractor', 'resize']].notna().all().all(), name
        if name in ('summary', 'sets', 'floors', 'best'): assert (t.extractor=='efficientnet_lite0 (ImageNet)').all()
    assert {'model', 'kind', 'epoch', 'pair', 'ssim', 'ms_ssim'}<=set(tables['scores']) and tables['scores'].notna().all().all()
    assert set(tables['best'].block)=={'whole film', 'inpainting'}
    for n in 'best', 'summary', 'scores', 'choice': assert (tables[n].groupby('model').block.nunique()==1).all()

def test_regions_tell_drawn_from_copied(run):
    t = pd.read_csv(run/'metrics'/'regions.csv').set_index(['model', 'kind', 'region'])
    assert t.error[('flux', 'samples', 'outside')]==0<t.error[('flux', 'raw', 'outside')]
    assert abs(t.error[('flux', 'samples', 'inside')]-t.error[('flux', 'raw', 'inside')])<1e-6
    assert t.ssim_full[('flux', 'samples', 'outside')]>.95>t.ssim_full[('flux', 'samples', 'inside')]
    assert 'gan' not in t.index.get_level_values(0) and t.loc[('telea', 'floor', 'outside'), 'error']==0
    assert t.error[('other_real', 'floor', 'outside')]>0
    region = region_masks(cv2.imread(str(run/'masks'/'f0__normal.png'), 0)[None])
    read = lambda k: cv2.imread(str(run/k/'f0__normal.png' if k!='images' else run/'images'/'f0.png'), 0)[None]/255
    one = pd.read_csv(run/'metrics'/'epochs'/'flux_raw_0010.csv').set_index('pair').loc['f0__normal']
    assert abs(ssim(read('images'), read('flux/raw/0010'), region['ring'].astype(float), 'piq_full')[0]-one.ssim_full_ring)<1e-5

def test_floors_and_sets(run):
    floors, sets = pd.read_csv(run/'metrics'/'floors.csv').set_index('floor'), pd.read_csv(run/'metrics'/'sets.csv')
    assert floors.block.to_dict()=={'noise': 'whole film', 'other_real': 'whole film', 'noise_mask': 'inpainting', 'mean_fill': 'inpainting', 'telea': 'inpainting'}
    assert floors.mmd2['other_real']<floors.mmd2['noise'] and floors.ssim['telea']>floors.ssim['noise_mask']
    assert set(sets.metric)=={'mmd2', 'precision', 'recall', 'density', 'coverage', 'vendi', 'vendi_real'} and set(sets.convention[sets.metric=='mmd2'])==set(MMD_CONVENTIONS)
    assert sets.value.notna().all()
    kept = np.load(run/'metrics'/'epochs'/'gan_samples_0010.npy')
    fx = np.concatenate([cached_features(cv2.imread(str(run/'images'/f'f{i}.png'), 0)[None], LITE, run/'metrics'/'features') for i in range(20)])
    row = sets[(sets.model=='gan') & (sets.metric=='mmd2') & (sets.convention=='KID')].value.iloc[0]
    assert kid(fx, kept)==pytest.approx(row, rel=1e-4)

def test_no_rank_below_twenty_films(run):
    t = pd.read_csv(run/'metrics'/'groups.csv').set_index(['model', 'metric', 'by', 'group'])
    assert t.loc[('gan', 'ssim', 'pathology', 'normal'), 'rank']==1 and t.loc[('gan', 'ssim', 'pathology', 'normal'), 'films']==20
    assert t.xs('view', level='by')['rank'].isna().all() and (t.low<t['mean']).all() and (t['mean']<t.high).all()

def test_how_films_are_enlarged_is_measured(run):
    t = pd.read_csv(run/'metrics'/'enlarge.csv').set_index('enlarged')
    assert t.side.to_dict()=={'bilinear': 176, 'bicubic': 176, 'nearest': 176, 'none': 44} and t.ssim[['bilinear', 'bicubic', 'nearest']].nunique()==3
    summary = pd.read_csv(run/'metrics'/'summary.csv').set_index('model')
    assert abs(t.ssim['bilinear']-summary.ssim['gan'])<1e-5 and abs(t.mmd2['bilinear']-summary.mmd2['gan'])<1e-4

def test_new_validation_films_leave_other_checkpoints_alone(run, tmp_path):
    "A model that starts to hold patients out changes the set of validation films, not the scores of what was scored"
    shutil.copytree(run, tmp_path/'run')
    at = tmp_path/'run'
    films = [i for i in range(20, 40)]
    def hold(model, those):
        for i in those: write_png(at/model/'validation'/'0010'/f'f{i}__normal.png', cv2.imread(str(at/'images'/f'f{i}.png'), 0))
    def names(): return {p.name: p.stat().st_mtime_ns for p in (at/'metrics'/'epochs').iterdir()}
    shutil.copytree(at/'gan'/'samples', at/'late'/'samples')
    hold('gan', films[4:])
    score_run(at, ['gan', 'late'], size=176, extractor=LITE, device='cpu')
    before = names()
    hold('late', films[:6])
    score_run(at, ['gan', 'late'], size=176, extractor=LITE, device='cpu')
    assert {n.split('.')[0] for n,t in names().items() if before.get(n)!=t}=={'late_validation_0010', 'real_validation'}

def test_statistics_of_a_run(run):
    intervals, tests, mmd = (pd.read_csv(run/'metrics'/f'{n}.csv', keep_default_na=False, na_values=['']) for n in ('intervals', 'tests', 'mmd'))
    ours = intervals[(intervals.model=='gan')&(intervals.metric=='ssim')].iloc[0]
    assert ours.low<ours['mean']<ours.high and (ours.n, ours.patients, ours.checkpoint, ours.region)==(20, 10, 'last', 'whole film')
    assert np.isclose(ours['mean'], pd.read_csv(run/'metrics'/'summary.csv').set_index('model').ssim['gan'], atol=1e-5)
    assert {'inside', 'ring', 'outside', 'whole film'}==set(intervals.region[intervals.model=='flux'])
    block = pd.read_csv(run/'metrics'/'floors.csv').set_index('floor').block.to_dict() | {'gan': 'whole film', 'flux': 'inpainting'}
    assert len(tests) and all(block[o.a]==block[o.b]==o.block for o in tests.itertuples()) and (tests.p_holm>=tests.p-1e-12).all()
    assert {tuple(o) for o in tests[['a', 'b']].to_numpy()}=={('gan', 'other_real'), ('flux', 'telea')}
    t = mmd[mmd.kind!='raw'].set_index(['model', 'convention'])
    assert t.loc[('noise', 'median'), 'p']<.05 and t.test['flux', 'median']=='swap' and t.test['gan', 'median']=='permutation'
    assert set(mmd.convention)==set(MMD_CONVENTIONS) and (mmd.low<mmd.estimate).all() and t.loc[('noise', 'median'), 'equivalent']==False
    assert pd.read_csv(run/'metrics'/'trends.csv').reason.str.contains('of the 3 trained checkpoints').all()
    variety, whole = (pd.read_csv(run/'metrics'/f'{n}.csv') for n in ('variety', 'sets'))
    both = variety.merge(whole, on=['model', 'kind', 'epoch', 'metric'], suffixes=('', '_of_sets'))
    assert len(both)==len(variety)==5*3 and np.allclose(both.value, both.value_of_sets, rtol=1e-4)      # of the GAN, of flux and of its raw films
    sure = variety[variety.reason.isna()]
    assert (sure.low<sure.value).all() and (sure.value<sure.high).all() and set(sure.metric)>={'vendi'} and variety.se[variety.reason.notna()].isna().all()

def test_noise_is_of_the_pairs_that_a_model_covers(run, tmp_path):
    shutil.copytree(run, tmp_path/'run')
    at = tmp_path/'run'
    for i in range(8): (at/'gan'/'samples'/'0010'/f'f{i}__normal.png').unlink()
    score_run(at, ['gan', 'flux'], size=176, extractor=LITE, device='cpu')
    best, noise = pd.read_csv(at/'metrics'/'best.csv').set_index(['model', 'metric']), pd.read_csv(at/'metrics'/'epochs'/'noise.csv')
    vectors_ = [np.load(at/'metrics'/'epochs'/f'{n}.npy')[8:] for n in ('real_test', 'noise')]
    assert best.n['gan', 'ssim']==12 and np.isclose(best.noise['gan', 'ssim'], noise.ssim[8:].mean(), atol=1e-6)
    assert np.isclose(best.noise['gan', 'mmd2_paper_A'], mmd2(*vectors_, 'paper_A'), rtol=1e-4)
    assert np.isclose(best.factor['gan', 'ssim'], best.best['gan', 'ssim']/noise.ssim[8:].mean(), rtol=1e-3)

def test_a_killed_run_loses_one_batch_at_most(run, tmp_path):
    shutil.copytree(run, tmp_path/'run', ignore=shutil.ignore_patterns('metrics'))
    code = textwrap.dedent(f'''
        import os, signal
        from elbowsynth import metrics
        whole, left = metrics.score_batch, [3]
        def dying(*a):
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            whole(*a)
        metrics.score_batch = dying
        metrics.score_run({str(tmp_path/'run')!r}, ['gan', 'flux'], size=176, extractor={LITE!r}, device='cpu')''')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode==-9
    scored = []
    whole = metrics.score_batch
    metrics.score_batch = lambda at,*a: (scored.append(at), whole(at, *a))
    try: score_run(tmp_path/'run', ['gan', 'flux'], size=176, extractor=LITE, device='cpu', statistics=run_statistics)
    finally: metrics.score_batch = whole
    assert len(scored)==2*(3+5)-3                                   # two batches each of three checkpoints and five floors; three were done
    for n in 'scores.csv', 'sets.csv', 'intervals.csv', 'tests.csv', 'mmd.csv', 'metrics.json': assert (tmp_path/'run'/'metrics'/n).read_text()==(run/'metrics'/n).read_text(), n
    assert not list((tmp_path/'run'/'metrics').rglob('*.parts'))

def test_only_what_is_new_is_scored(run):
    said = json.loads((run/'metrics'/'metrics.json').read_text())
    times = {p: p.stat().st_mtime_ns for p in (run/'metrics'/'epochs').iterdir()}
    shutil.copytree(run/'gan'/'samples'/'0010', run/'gan'/'samples'/'0020')
    try: again = score_run(run, ['gan', 'flux'], size=176, extractor=LITE, device='cpu', statistics=run_statistics)
    finally: shutil.rmtree(run/'gan'/'samples'/'0020')
    new = {p.name.split('.')[0] for p in (run/'metrics'/'epochs').iterdir() if times.get(p)!=p.stat().st_mtime_ns}
    assert new=={'gan_samples_0020'} and {k: v for k,v in again.items()}==said

def test_films_of_different_size_are_named():
    x = [np.zeros((40, 40)), np.zeros((40, 40)), np.zeros((40, 41))]
    with pytest.raises(ValueError, match='film 2 of x is 40x41'): ssim(x, x)

def test_sets_on_another_device():
    "The branch of a GPU, on the CPU"
    fx,fy = vectors(30, 20)
    for c in MMD_CONVENTIONS: assert mmd2(fx, fy, c, device=torch.device('cpu'))==mmd2(fx, fy, c)
    if torch.cuda.is_available():
        for c in MMD_CONVENTIONS: assert np.isclose(mmd2(fx, fy, c, device='cuda'), mmd2(fx, fy, c), atol=1e-9)
