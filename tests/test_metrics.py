"""Comparison with piq, torchmetrics, scikit-image and scikit-learn on hard inputs, and how the stage `metrics` handles changes and interruptions."""
import csv, importlib, itertools, json, os, re, shutil, signal, sys
import cv2, numpy as np, pandas as pd, piq, pytest, torch
import torchmetrics.functional.image as tm
from conftest import sh
from scipy.ndimage import correlate1d
from scipy.spatial.distance import cdist
from skimage.metrics import structural_similarity
from sklearn.metrics.pairwise import pairwise_distances, polynomial_kernel, rbf_kernel
from elbowsynth.data.images import write_png
from elbowsynth.evaluation import extractors, metrics
from elbowsynth.evaluation.baselines import load_autoencoders, region_masks, vae_reconstruct
from elbowsynth.evaluation.extractors import cached_features, features, load_arrays, save_arrays, state_dict
from elbowsynth.evaluation.metrics import (
    baseline_comparison, best_checkpoints, checkpoint_selection, final_checkpoints, score_run, selected_epoch)
from elbowsynth.evaluation.mmd import (
    gaussian_kernel, kernel_sums, kid, median_distance, mmd2, MMD_CONVENTIONS, prdc, set_metrics, sq_dists, vendi)
from elbowsynth.evaluation.run_statistics import run_statistics
from elbowsynth.evaluation.stats import mmd_jackknife
from elbowsynth.evaluation.ssim import (
    combine_scales, ms_ssim, MS_SSIM_CONVENTIONS, pair_scores, scale_statistics, ssim,
    SSIM_CONVENTIONS, ssim_maps)

EXTRACTOR = 'efficientnet_lite0'

def hard_pairs(h, w):
    "Random, constant, inverted and extreme images in pairs"
    rng = np.random.default_rng(h*1000+w)
    x, smooth = rng.random((2, h, w))
    smooth = cv2.GaussianBlur(smooth, (0, 0), 4)
    smooth = (smooth-smooth.min())/np.ptp(smooth)
    white, black = np.ones((h, w)), np.zeros((h, w))
    board = np.indices((h, w)).sum(0)%2/1.
    return {
        'random': (x, rng.random((h, w))),
        'similar': (smooth, np.clip(smooth+rng.normal(0, .05, (h, w)), 0, 1)),
        'inverted': (smooth, 1-smooth),
        'constant': (.3*white, .6*white),
        'white and black': (white, black),
        'black and black': (black, black),
        'white and random': (white, x),
        'board and its negative': (board, 1-board),
        'binary': ((x>.5)/1., (smooth>.5)/1.),
        'low contrast': (1e-3*x, 1e-3*smooth),
        'nearly white': (1-1e-3*x, white)}

def hard_stacks(h, w, dtype):
    "All hard pairs as two stacks (n, h, w)"
    return [np.stack(images).astype(dtype) for images in zip(*hard_pairs(h, w).values())]

def as_tensors(*stacks, dtype=None): return [torch.tensor(o, dtype=dtype)[:, None] for o in stacks]

def skimage_ssim(x, y, **kwargs):
    return np.array([structural_similarity(a, b, data_range=1, **kwargs)
                     for a,b in zip(x[:, 0].numpy(), y[:, 0].numpy())])

def wang_ssim(x, y):
    return skimage_ssim(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)

LIBRARIES = {
    'piq': lambda x,y: piq.ssim(x, y, reduction='none'),
    'piq_full': lambda x,y: piq.ssim(x, y, downsample=False, reduction='none'),
    'torchmetrics': lambda x,y: tm.structural_similarity_index_measure(
        x, y, data_range=1., reduction='none'),
    'skimage': skimage_ssim,
    'wang': wang_ssim}
LIBRARIES_MS = {
    'piq': lambda x,y: piq.multi_scale_ssim(x, y, reduction='none'),
    'torchmetrics': lambda x,y: tm.multiscale_structural_similarity_index_measure(
        x, y, data_range=1., reduction='none')}

# Only piq pools, and only from 384 pixels; the others are slow at that size
@pytest.mark.parametrize('convention,h,w', [*itertools.product(LIBRARIES, (64, 97), (64, 131)), ('piq', 400, 391)])
def test_ssim_equals_its_library(convention, h, w):
    x,y = hard_stacks(h, w, float)
    expected = np.asarray(LIBRARIES[convention](*as_tensors(x, y)))
    assert np.abs(ssim(x, y, convention=convention)-expected).max()<1e-5
    single = ssim(x.astype(np.float32), y.astype(np.float32), convention=convention)
    assert np.abs(single-expected).max()<1e-4

LARGE = pytest.param(256, 311, marks=pytest.mark.long('a larger image, 10 s'))

@pytest.mark.parametrize('h,w', [(161, 161), (161, 230), (177, 176), LARGE])
@pytest.mark.parametrize('convention', LIBRARIES_MS)
def test_ms_ssim_equals_its_library(convention, h, w):
    x,y = hard_stacks(h, w, float)
    library = LIBRARIES_MS[convention]
    smallest = MS_SSIM_CONVENTIONS[convention]['smallest']
    if min(h, w)<smallest:
        with pytest.raises(ValueError, match=f'at least {smallest}'):
            ms_ssim(x, y, convention=convention)
        with pytest.raises(ValueError): library(*as_tensors(x, y))
        return
    expected = library(*as_tensors(x, y)).numpy()
    assert np.abs(ms_ssim(x, y, convention=convention)-expected).max()<1e-5
    library_single = library(*as_tensors(x, y, dtype=torch.float32)).numpy()
    single = ms_ssim(x.astype(np.float32), y.astype(np.float32), convention=convention)
    # where a factor is close to zero, float32 is not better in the library
    tolerance = np.maximum(1e-4, 2*np.abs(library_single-expected))
    error = np.abs(single-expected)
    assert (error<tolerance).all(), error

@pytest.mark.parametrize('shape', [(1, 160, 400), (1, 400, 160)])
def test_ms_ssim_below_161_pixels_is_an_error_in_both(shape):
    x = np.random.default_rng(0).random(shape)
    with pytest.raises(ValueError, match='at least 161'): ms_ssim(x, x)
    with pytest.raises(ValueError): piq.multi_scale_ssim(*as_tensors(x, x))

@pytest.mark.parametrize('convention', SSIM_CONVENTIONS)
def test_ssim_with_a_mask_of_ones_equals_ssim_without_mask(convention):
    x,y = hard_stacks(300, 331, float)
    expected = ssim(x, y, convention=convention)
    assert np.abs(ssim(x, y, np.ones_like(x), convention)-expected).max()<1e-9
    assert np.abs(ssim(x, y, .3*np.ones_like(x), convention)-expected).max()<1e-9

@pytest.mark.parametrize('convention', MS_SSIM_CONVENTIONS)
def test_ms_ssim_with_a_mask_of_ones_equals_ms_ssim_without_mask(convention):
    x,y = hard_stacks(193, 200, float)
    expected = ms_ssim(x, y, convention=convention)
    assert np.abs(ms_ssim(x, y, np.ones_like(x), convention)-expected).max()<1e-9

def test_ssim_in_a_box_equals_ssim_of_the_crop():
    "The crop contains all windows whose center is in the box"
    x,y = (o[1:2] for o in hard_stacks(120, 140, float))
    mask = np.zeros_like(x)
    mask[:, 30:80, 40:100] = 1
    crop = ssim(x[:, 25:85, 35:105], y[:, 25:85, 35:105], convention='piq_full')[0]
    assert abs(ssim(x, y, mask, 'piq_full')[0]-crop)<1e-9

def mean_over_squares(image, factor):
    h, w = image.shape[0]//factor, image.shape[1]//factor
    return image[:h*factor, :w*factor].reshape(h, factor, w, factor).mean((1, 3))

def ssim_map_by_scipy(x, y):
    "SSIM at each window inside the image, from Wang et al. (2004), Eq. 13"
    weights = np.exp(-np.arange(-5, 6)**2/(2*1.5**2))
    weights /= weights.sum()
    def mean(image):
        filtered = correlate1d(correlate1d(image, weights, 0), weights, 1)
        return filtered[5:-5, 5:-5]
    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x*y)-mean_x*mean_y
    variances = mean(x*x)-mean_x**2+mean(y*y)-mean_y**2
    luminance = (2*mean_x*mean_y+1e-4)/(mean_x**2+mean_y**2+1e-4)
    return luminance*(2*covariance+9e-4)/(variances+9e-4)

# Shorter side to the side of the squares: max(1, round(side/256)), halves to the even number
POOLING = {255: 1, 256: 1, 383: 1, 384: 2, 385: 2, 448: 2, 511: 2, 512: 2, 640: 2, 641: 3}

@pytest.mark.parametrize('side', POOLING)
@pytest.mark.parametrize('on_gpu', [False, True])
def test_pooling_of_ssim_by_hand(side, on_gpu, monkeypatch):
    "Every entrance that pools, against averages over squares and scipy's filter; the longer side does not count"
    if on_gpu: monkeypatch.setattr(importlib.import_module('elbowsynth.evaluation.ssim'), 'map_pairs', map_stacks)
    rng = np.random.default_rng(side)
    x = rng.random((side, side+130))
    y, mask = .6*x+.4*rng.random(x.shape), np.zeros(x.shape)
    mask[side//3:, :side//2] = 1
    factor = POOLING[side]
    pooled = ssim_map_by_scipy(mean_over_squares(x, factor), mean_over_squares(y, factor))
    weights = mean_over_squares(mask, factor)[5:-5, 5:-5]
    full = ssim_map_by_scipy(x, y).mean()
    for transpose in False, True:
        a, b, m = ((o.T if transpose else o)[None].copy() for o in (x, y, mask))
        assert ssim(a, b)[0]==pytest.approx(pooled.mean(), abs=1e-9)
        assert ssim(a, b, m)[0]==pytest.approx((pooled*weights).sum()/weights.sum(), abs=1e-9)
        scores = pair_scores(a, b).iloc[0]
        assert scores.ssim==pytest.approx(pooled.mean(), abs=1e-9)
        assert scores.ssim_full==pytest.approx(full, abs=1e-9)
        for convention in 'piq_full', 'wang':
            assert ssim(a, b, convention=convention)[0]==pytest.approx(full, abs=1e-9)

def map_stacks(f, stacks, device='cpu', batch=4):
    "The branch of `map_pairs` for a GPU, with the stacks on the CPU"
    results = []
    for i in range(0, len(stacks[0]), batch):
        results.append(f(*(o[i:i+batch] for o in stacks)).numpy())
    return np.concatenate(results)

def test_tensor_code_equals_opencv_code(monkeypatch):
    "The code that a GPU runs, on the CPU"
    x,y = hard_stacks(193, 200, float)
    tx,ty = torch.tensor(x), torch.tensor(y)
    for o in SSIM_CONVENTIONS.values():
        args = o['window'], o['reflect'], o['sample']
        by_image = np.stack([ssim_maps(a, b, *args)[0].mean() for a,b in zip(x, y)])
        stacked = ssim_maps(tx, ty, *args)[0].mean((1, 2)).numpy()
        assert np.abs(stacked-by_image).max()<1e-9
    for o in MS_SSIM_CONVENTIONS.values():
        mask = np.random.default_rng(0).random(x.shape)
        by_image = np.stack([scale_statistics(a, b, [c], o) for a,b,c in zip(x, y, mask)])
        stacked = scale_statistics(tx, ty, [torch.tensor(mask)], o).numpy()
        assert np.abs(stacked-by_image).max()<1e-9
    masks = {'half': (np.arange(200)<100)*np.ones_like(x)}
    by_image = pair_scores(x, y, masks)
    module = importlib.import_module('elbowsynth.evaluation.ssim')
    monkeypatch.setattr(module, 'map_pairs', map_stacks)
    stacked = pair_scores(x, y, masks)
    pd.testing.assert_frame_equal(by_image, stacked, atol=1e-9, rtol=0)

def test_a_negative_scale_counts_as_zero():
    x,y = (o[2:3] for o in hard_stacks(200, 200, float))            # inverted
    assert ms_ssim(x, y)[0]==0 and ssim(x, y)[0]<0
    assert combine_scales(np.array([1., 1, 1, 1, 1]))==1

@pytest.mark.parametrize('spoil,message', [
    (lambda a: a*255, 'image 2 of y has values from 0 to 255'),
    (lambda a: a-.5, 'image 2 of y has values from -0.5 to 0.5'),
    (lambda a: a*np.nan, 'image 2 of y contains NaN')])
def test_message_names_the_invalid_image(spoil, message):
    x = np.random.default_rng(0).random((4, 170, 170))
    y = x.copy()
    x[2, 0, :2] = y[2, 0, :2] = 0, 1
    y[2] = spoil(y[2])
    for f in ssim, ms_ssim, pair_scores:
        with pytest.raises(ValueError, match=message): f(x, y)
    with pytest.raises(ValueError, match=message.replace(' of y', ' of images')):
        features(y, EXTRACTOR)

def test_shapes_and_counts_are_checked():
    x = np.random.default_rng(0).random((4, 170, 170))
    with pytest.raises(ValueError, match=r'expected images as \(n, h, w\)'): ssim(x[:, None], x[:, None])
    with pytest.raises(ValueError, match='x has 4 images of 170x170 pixels, y has 3'):
        ssim(x, x[:3])
    with pytest.raises(ValueError, match='x has 4 images of 170x170 pixels, y has 4 of 170x160'):
        ms_ssim(x, x[..., :160])
    with pytest.raises(ValueError, match='mask has the shape'): ssim(x, x, np.ones((3, 170, 170)))
    masks = np.stack([*np.ones((3, 170, 170)), np.zeros((170, 170))])
    with pytest.raises(ValueError, match='mask 3'): ssim(x, x, masks)
    with pytest.raises(ValueError, match="unknown convention 'x'"): mmd2(x[:, 0], x[:, 0], 'x')

def test_images_of_different_size_are_named():
    x = [np.zeros((40, 40)), np.zeros((40, 40)), np.zeros((40, 41))]
    with pytest.raises(ValueError, match='image 2 of x is 40x41'): ssim(x, x)

def random_features(m, n, d=40):
    "Two sets of non-negative vectors"
    rng = np.random.default_rng(m+n)
    return np.maximum(rng.normal(1, 1, (m, d)), 0), np.maximum(rng.normal(1.2, .8, (n, d)), 0)

def l2_normalize(vectors): return vectors/np.linalg.norm(vectors, axis=1, keepdims=True)

def sklearn_kernel(fx, fy, convention):
    "The kernel of a convention, from scikit-learn"
    if convention=='KID': return lambda a,b: polynomial_kernel(a, b, degree=3)
    if convention=='multi_bandwidth':
        sq_dists = pairwise_distances(np.concatenate((fx, fy)))**2
        mean = sq_dists.sum()/(len(sq_dists)**2-len(sq_dists))
        bandwidths = [mean/4*2**i for i in range(5)]
        return lambda a,b: sum(np.exp(-pairwise_distances(a, b)**2/s) for s in bandwidths)
    dist = pairwise_distances(fx)
    median = np.median(dist[~np.eye(len(fx), dtype=bool)])
    gamma = {'paper_unit_sigma10': 1/200, 'paper_raw_gamma1d': None, 'median': 1/(2*median**2)}
    return lambda a,b: rbf_kernel(a, b, gamma=gamma[convention])

def mmd2_by_sklearn(fx, fy, convention):
    if convention=='paper_unit_sigma10': fx,fy = l2_normalize(fx), l2_normalize(fy)
    kernel = sklearn_kernel(fx, fy, convention)
    xx,yy,xy = kernel(fx, fx), kernel(fy, fy), kernel(fx, fy)
    if not MMD_CONVENTIONS[convention]['unbiased']: return xx.mean()+yy.mean()-2*xy.mean()
    def off_diagonal(k): return (k.sum()-np.trace(k))/(len(k)*(len(k)-1))
    return off_diagonal(xx)+off_diagonal(yy)-2*xy.mean()

@pytest.mark.parametrize('m,n', [(30, 30), (50, 23)])
@pytest.mark.parametrize('convention', MMD_CONVENTIONS)
def test_mmd_equals_sklearn(convention, m, n):
    fx,fy = random_features(m, n)
    expected = mmd2_by_sklearn(fx, fy, convention)
    assert abs(mmd2(fx, fy, convention)-expected)<1e-9
    single = mmd2(fx.astype(np.float32), fy.astype(np.float32), convention)
    assert abs(single-expected)<1e-4*max(1, abs(expected))
    assert mmd2(fx, fx, convention)<=1e-12
    if convention not in ('KID', 'paper_unit_sigma10'):             # others depend on distances only
        assert abs(mmd2(100+fx, 100+fy, convention)-expected)<1e-9

def direct_sq_dists(a, b): return cdist(a, b, 'sqeuclidean')            # sums of squared differences

def direct_kernel(fx, fy, convention):
    "The kernel of a convention from sums of squared differences"
    if convention=='KID': return lambda a,b: (a@b.T/a.shape[1]+1)**3
    if convention=='multi_bandwidth':
        both = np.concatenate((fx, fy))
        mean = direct_sq_dists(both, both).sum()/(len(both)*(len(both)-1))
        return lambda a,b: sum(np.exp(-direct_sq_dists(a, b)/(mean*2**i/4)) for i in range(5))
    within = direct_sq_dists(fx, fx)[np.triu_indices(len(fx), 1)]
    sq_sigma = {'paper_unit_sigma10': 100, 'paper_raw_gamma1d': fx.shape[1]/2, 'median': np.median(within)}
    return lambda a,b: np.exp(-direct_sq_dists(a, b)/(2*sq_sigma[convention]))

def direct_mmd2(fx, fy, convention):
    if convention=='paper_unit_sigma10': fx, fy = l2_normalize(fx), l2_normalize(fy)
    kernel = direct_kernel(fx, fy, convention)
    within = []
    for f in fx, fy:
        k, n = kernel(f, f), len(f)
        unbiased = MMD_CONVENTIONS[convention]['unbiased']
        within.append(k[~np.eye(n, dtype=bool)].mean() if unbiased else k.mean())
    return sum(within)-2*kernel(fx, fy).mean()

@pytest.mark.parametrize('far', [0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize('which', ['real', 'synthetic', 'both'])
def test_one_far_vector_does_not_change_the_distances_of_the_others(which, far):
    "Squared distances were set to zero where they were small compared with the largest one"
    fx,fy = random_features(24, 19, 12)
    fy += .8
    if which!='synthetic': fx[3] += far
    if which!='real': fy[5] += 1.01*far
    both = np.concatenate((fx, fy))
    assert np.allclose(sq_dists(both, both), direct_sq_dists(both, both), rtol=1e-6, atol=0)
    expected = direct_mmd2(fx, fy, 'median')
    assert expected>.2                                                  # far or not, the sets differ
    for convention in MMD_CONVENTIONS:
        expected = direct_mmd2(fx, fy, convention)
        tolerance = 1e-6*max(1, abs(expected))
        assert abs(mmd2(fx, fy, convention)-expected)<tolerance, convention
    kernel = gaussian_kernel(median_distance(fx))
    for dtype,tolerance in (float, 1e-6), (np.float32, 2e-3):
        estimate = mmd_jackknife(fx.astype(dtype), fy.astype(dtype), kernel)['estimate']
        assert abs(estimate-direct_mmd2(fx, fy, 'median'))<tolerance, dtype
    distances = np.sqrt(direct_sq_dists(fx, fy))
    radii_x, radii_y = (np.sort(np.sqrt(direct_sq_dists(f, f)), 1)[:, 5] for f in (fx, fy))
    inside = distances<radii_x[:, None]
    assert prdc(fx, fy)==pytest.approx({
        'precision': inside.any(0).mean(), 'recall': (distances<radii_y).any(1).mean(),
        'density': inside.sum(0).mean()/5, 'coverage': inside.any(1).mean()})

def test_sets_of_small_features_have_distances():
    "Whether real images differ was decided after rounding to three digits"
    fx,fy = random_features(12, 12, 8)
    names = [f'f{i}' for i in range(12)]
    table = set_metrics(1e-5*fx, 1e-5*fy, names)
    value = table[(table.metric=='mmd2')&(table.convention=='median')].value.iloc[0]
    assert value==pytest.approx(direct_mmd2(fx, fy, 'median'), rel=1e-6)
    assert set_metrics(np.repeat(fx[:1], 12, 0), fy, names).value[:5].isna().all()

def test_kernel_sums_do_not_depend_on_the_block_size():
    fx,fy = random_features(41, 30)
    for convention in MMD_CONVENTIONS:
        one_block = kernel_sums(fx, fy, convention)
        blocks = kernel_sums(fx, fy, convention, block_size=8)
        for name in one_block: assert np.allclose(one_block[name], blocks[name], atol=1e-9)
        assert np.isclose(one_block['xy'].sum(), one_block['yx'].sum())

def test_kid_equals_torchmetrics():
    from torchmetrics.image.kid import poly_mmd
    fx,fy = random_features(60, 60)
    assert abs(kid(fx, fy)-float(poly_mmd(torch.tensor(fx), torch.tensor(fy))))<1e-6
    # torchmetrics raises an error for a subset that is larger than the set
    assert np.isfinite(kid(fx[:9], fy, subset_size=1000, n_subsets=3))

def test_prdc_equals_brute_force():
    from sklearn.neighbors import NearestNeighbors
    fx,fy = random_features(70, 55, 4)
    k = 5
    def radii(f):
        return NearestNeighbors(n_neighbors=k+1).fit(f).kneighbors(f)[0][:, k]
    distances = pairwise_distances(fx, fy)
    inside = distances<radii(fx)[:, None]
    expected = {
        'precision': inside.any(0).mean(), 'recall': (distances<radii(fy)).any(1).mean(),
        'density': inside.sum(0).mean()/k, 'coverage': inside.any(1).mean()}
    for block in 2048, 16: assert prdc(fx, fy, k, block)==pytest.approx(expected)

def test_vendi_equals_the_entropy_of_the_full_matrix():
    fx,_ = random_features(30, 30)
    for f in fx, fx[:, :7]+.01:
        unit = l2_normalize(f)
        eigenvalues = np.linalg.eigvalsh(unit@unit.T/len(unit))
        eigenvalues = eigenvalues[eigenvalues>1e-12]
        entropy = -(eigenvalues*np.log(eigenvalues)).sum()
        assert vendi(f)==pytest.approx(np.exp(entropy), rel=1e-6)

def test_mmd_on_a_given_device():
    "The code for a GPU, on the CPU"
    fx,fy = random_features(30, 20)
    for c in MMD_CONVENTIONS:
        assert mmd2(fx, fy, c, device=torch.device('cpu'))==mmd2(fx, fy, c)
        if torch.cuda.is_available():
            assert np.isclose(mmd2(fx, fy, c, device='cuda'), mmd2(fx, fy, c), atol=1e-9)

# --- Extractors and autoencoders

def test_weight_files_are_loaded_without_executing_code(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    torch.save({'fc.bias': Trap()}, tmp_path/'trap.pth')
    with pytest.raises(ValueError, match='without executing'): state_dict(tmp_path/'trap.pth')
    assert not (tmp_path/'executed').exists()

def test_weights_that_cannot_be_downloaded_are_an_error(monkeypatch):
    from torchvision.models import ResNet50_Weights
    def fail(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(type(ResNet50_Weights.IMAGENET1K_V2), 'get_state_dict', fail)
    with pytest.raises(OSError, match='resnet50:FILE'):
        extractors.features(np.zeros((1, 32, 32)), 'resnet50')

def test_features_are_cached_by_content(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40), np.uint8)
    first = cached_features(images, EXTRACTOR, tmp_path)
    paths = sorted(tmp_path.iterdir())
    times = [path.stat().st_mtime_ns for path in paths]
    again = cached_features(images, EXTRACTOR, tmp_path)
    assert (again==first).all() and times==[path.stat().st_mtime_ns for path in paths]
    assert len(set(tmp_path.iterdir()))==2
    cached_features(images[:, :39], EXTRACTOR, tmp_path)
    assert len(set(tmp_path.iterdir()))==4 and first.shape==(2, 1280)

def damaged_versions(content):
    "A file cut at some places, emptied, overwritten, and with one bit changed at every few bytes"
    yield from (b'', b'x', content[:len(content)//2], content[:-1], content[1:])
    for i in range(0, len(content), max(1, len(content)//150)):
        changed = bytearray(content)
        changed[i] ^= 1<<i%8
        yield bytes(changed)

def test_a_damaged_file_of_arrays_is_never_trusted(tmp_path, capsys):
    path, values = tmp_path/'x.npz', np.random.default_rng(0).normal(size=40)
    save_arrays(path, vector=values, key=np.array('abc'))
    content, n_damaged = path.read_bytes(), 0
    for damaged in damaged_versions(content):
        path.write_bytes(damaged)
        arrays = load_arrays(path)
        if arrays is None: n_damaged += 1
        else: assert (arrays['vector']==values).all() and str(arrays['key'])=='abc'  # a time, or the like
    said = capsys.readouterr().out.splitlines()
    assert len(said)==n_damaged>100 and all('x.npz is damaged' in line and 'made anew' in line for line in said)

def test_damaged_features_are_computed_again(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40), np.uint8)
    first = cached_features(images, EXTRACTOR, tmp_path)
    for damage in (b'', None):
        path = sorted(tmp_path.iterdir())[0]
        content = bytearray(path.read_bytes())
        content[len(content)//2] ^= 64                                  # in the middle of the vector
        path.write_bytes(content if damage is None else damage)
        assert np.allclose(cached_features(images, EXTRACTOR, tmp_path), first, atol=1e-4)
        assert f'{path.name} is damaged' in capsys.readouterr().out
        cached_features(images, EXTRACTOR, tmp_path)
        assert capsys.readouterr().out==''

def small_autoencoder():
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=['DownEncoderBlock2D']*2,
        up_block_types=['UpDecoderBlock2D']*2, norm_num_groups=2)

def test_reconstruction_by_an_autoencoder_of_diffusers(tmp_path):
    torch.manual_seed(0)
    small_autoencoder().save_pretrained(tmp_path/'base'/'vae')
    vae = load_autoencoders([f'toy={tmp_path}/base'], 'cpu')['toy']
    images, masks = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32), np.uint8)
    decoded = vae_reconstruct(images, vae, masks)
    assert (decoded==vae_reconstruct(images, vae, masks)).all()
    assert (decoded[masks<=127]==images[masks<=127]).all()
    assert (decoded!=images).any()

@pytest.mark.long('waits for a hub that is not there, 40 s')
def test_autoencoder_of_a_downloaded_base_model_is_found_by_name(tmp_path):
    cached = tmp_path/'hub'/'models--some--base'                    # layout of the hub's cache
    small_autoencoder().save_pretrained(cached/'snapshots'/('0'*40)/'vae')
    (cached/'refs').mkdir()
    (cached/'refs'/'main').write_text('0'*40)
    code = ('from elbowsynth.evaluation.baselines import load_autoencoders; '
            "print(load_autoencoders(['toy=some/{}'], 'cpu'))")
    hub = str(tmp_path/'hub')
    found = sh(sys.executable, '-c', code.format('base'), HF_HUB_CACHE=hub)
    assert 'AutoencoderKL' in found.stdout
    missing = sh(sys.executable, '-c', code.format('other'), check=False, HF_HUB_CACHE=hub)
    assert "autoencoder 'toy=some/other'" in missing.stderr
    assert 'Write NAME=BASE' in missing.stderr

# --- The stage `metrics`

def write_run(folder, n=20, size=176, prefix='f'):
    "A run with one GAN and one inpainting model, n test and n training images"
    rng = np.random.default_rng(0)
    def smooth_image():
        noise = cv2.GaussianBlur(rng.random((size, size)), (0, 0), 6)
        return (255*cv2.normalize(noise, None, 0, 1, cv2.NORM_MINMAX)).astype(np.uint8)
    mask = np.zeros((size, size), np.uint8)
    mask[60:120, 50:130] = 255
    rows = []
    for i in range(2*n):
        name, image = f'{prefix}{i}__normal', smooth_image()
        rows.append({
            'pair': name, 'image': f'{prefix}{i}', 'patient': f'p{i//2}', 'view': ('AP', 'LAT')[i%2],
            'pathology': 'normal', 'split': 'test' if i<n else 'train'})
        write_png(folder/'images'/f'{prefix}{i}.png', image)
        if i>=n: continue
        write_png(folder/'masks'/f'{name}.png', mask)
        write_png(folder/'gan'/'samples'/'0010'/f'{name}.png', smooth_image()[::4, ::4].copy())
        generated = smooth_image()
        write_png(folder/'flux'/'raw'/'0010'/f'{name}.png', generated)
        inpainted = np.where(mask>0, generated, image)
        write_png(folder/'flux'/'samples'/'0010'/f'{name}.png', inpainted)
    (folder/'split').mkdir()
    pd.DataFrame(rows).to_csv(folder/'split'/'pairs.csv', index=False)
    return folder

def score(run, models=('gan', 'flux'), **kwargs):
    return score_run(run, list(models), size=176, extractor=EXTRACTOR, device='cpu', **kwargs)

def read_table(run, name, **kwargs): return pd.read_csv(run/'metrics'/f'{name}.csv', **kwargs)

def modification_times(run):
    return {p.name: p.stat().st_mtime_ns for p in (run/'metrics'/'epochs').iterdir()}

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp('run'))
    score(folder, statistics=run_statistics)
    return folder

def test_every_table_has_its_metadata(run):
    tables = {p.stem: pd.read_csv(p) for p in (run/'metrics').glob('*.csv')}
    assert set(tables)=={
        'scores', 'summary', 'best_checkpoints', 'baseline_comparison', 'checkpoint_selection', 'baselines',
        'mask_regions', 'set_metrics', 'subgroups', 'upsampling', 'confidence_intervals',
        'significance_tests', 'trends', 'mmd_intervals', 'fidelity_diversity'}
    tables |= {p.name: pd.read_csv(p) for p in (run/'metrics'/'epochs').glob('*.csv')}
    metadata = ['convention', 'estimator', 'extractor', 'resize']
    for name,table in tables.items():
        assert len(table) and table[metadata].notna().all().all(), name
    for name in 'summary', 'set_metrics', 'baselines', 'best_checkpoints':
        assert (tables[name].extractor=='efficientnet_lite0 (ImageNet)').all()
    scores = tables['scores']
    assert {'model', 'source', 'epoch', 'pair', 'ssim', 'ms_ssim'}<=set(scores)
    assert scores.notna().all().all()
    assert set(tables['best_checkpoints'].task)=={'full image', 'inpainting'}
    for name in 'best_checkpoints', 'summary', 'scores', 'checkpoint_selection':
        assert (tables[name].groupby('model').task.nunique()==1).all()

def test_mask_regions_separate_generated_from_copied_pixels(run):
    table = read_table(run, 'mask_regions').set_index(['model', 'source', 'region'])
    mae, ssim_full = table.mae, table.ssim_full
    assert mae[('flux', 'samples', 'outside')]==0<mae[('flux', 'raw', 'outside')]
    assert abs(mae[('flux', 'samples', 'inside')]-mae[('flux', 'raw', 'inside')])<1e-6
    outside, inside = ssim_full[('flux', 'samples', 'outside')], ssim_full[('flux', 'samples', 'inside')]
    assert outside>.95>inside
    assert 'gan' not in table.index.get_level_values(0)
    assert mae[('telea', 'baseline', 'outside')]==0
    assert mae[('other_real', 'baseline', 'outside')]>0

    def read(path): return cv2.imread(str(run/path), 0)[None]
    boundary = region_masks(read('masks/f0__normal.png'))['boundary'].astype(float)
    real, generated = read('images/f0.png')/255, read('flux/raw/0010/f0__normal.png')/255
    scores = read_table(run, 'epochs/flux_raw_0010').set_index('pair').loc['f0__normal']
    expected = ssim(real, generated, boundary, 'piq_full')[0]
    assert abs(expected-scores.ssim_full_boundary)<1e-5

def test_baselines_and_set_metrics(run):
    baselines = read_table(run, 'baselines').set_index('baseline')
    sets = read_table(run, 'set_metrics')
    assert baselines.task.to_dict()=={
        'noise': 'full image', 'flat_gray': 'full image', 'mean_image': 'full image', 'other_real': 'full image',
        'noise_mask': 'inpainting', 'mean_fill': 'inpainting', 'telea': 'inpainting'}
    assert baselines.mmd2['other_real']<baselines.mmd2['noise']
    assert baselines.ssim['telea']>baselines.ssim['noise_mask']
    assert set(sets.metric)=={
        'mmd2', 'precision', 'recall', 'density', 'coverage', 'vendi', 'vendi_real'}
    assert set(sets.convention[sets.metric=='mmd2'])==set(MMD_CONVENTIONS)
    assert sets.value.notna().all()
    fy = np.load(run/'metrics'/'epochs'/'gan_samples_0010.npy')
    fx = []
    for i in range(20):
        image = cv2.imread(str(run/'images'/f'f{i}.png'), 0)[None]
        fx.append(cached_features(image, EXTRACTOR, run/'metrics'/'features'))
    gan_kid = sets[(sets.model=='gan') & (sets.metric=='mmd2') & (sets.convention=='KID')]
    assert kid(np.concatenate(fx), fy)==pytest.approx(gan_kid.value.iloc[0], rel=1e-4)

def test_no_rank_and_no_interval_below_twenty_images(run):
    table = read_table(run, 'subgroups').set_index(['model', 'metric', 'grouping', 'group'])
    normal = table.loc[('gan', 'ssim', 'pathology', 'normal')]
    assert normal['rank']==1 and normal.n_images==20
    assert table.xs('view', level='grouping')['rank'].isna().all()
    few = table[table.n_images<20]
    assert len(few) and few[['ci_low', 'ci_high']].isna().all(axis=None)
    assert normal.ci_low<normal['mean']<normal.ci_high

def test_effect_of_upsampling_is_measured(run):
    table = read_table(run, 'upsampling').set_index('upsampling')
    assert table['size'].to_dict()=={'bilinear': 176, 'bicubic': 176, 'nearest': 176, 'none': 44}
    assert table.ssim[['bilinear', 'bicubic', 'nearest']].nunique()==3
    summary = read_table(run, 'summary').set_index('model')
    assert abs(table.ssim['bilinear']-summary.ssim['gan'])<1e-5
    assert abs(table.mmd2['bilinear']-summary.mmd2['gan'])<1e-4

@pytest.mark.long('scores two runs, 10 s')
def test_new_validation_images_do_not_change_other_checkpoints(run, tmp_path):
    "A model that starts to hold out patients changes the validation set, not existing scores"
    folder = tmp_path/'run'
    shutil.copytree(run, folder)
    def write_validation(model, indices):
        for i in indices:
            image = cv2.imread(str(folder/'images'/f'f{i}.png'), 0)
            write_png(folder/model/'validation'/'0010'/f'f{i}__normal.png', image)
    shutil.copytree(folder/'gan'/'samples', folder/'late'/'samples')
    write_validation('gan', range(24, 40))
    score(folder, ['gan', 'late'])
    before = modification_times(folder)
    write_validation('late', range(20, 26))
    score(folder, ['gan', 'late'])
    changed = {n.split('.')[0] for n,t in modification_times(folder).items() if before.get(n)!=t}
    assert changed=={'late_validation_0010', 'real_validation'}

def test_baselines_that_learn_nothing_by_hand(run):
    "Flat gray and the mean of the training images, scored by piq from the files of the run"
    def read(i): return cv2.imread(str(run/'images'/f'f{i}.png'), 0).astype(float)
    test_images = torch.tensor(np.stack([read(i) for i in range(20)]))[:, None]/255
    mean = np.round(np.mean([read(i) for i in range(20, 40)], 0))
    table = read_table(run, 'baselines').set_index('baseline')
    for name, image in (('flat_gray', np.full((176, 176), 127.)), ('mean_image', mean)):
        repeated = torch.tensor(image/255)[None, None].repeat(20, 1, 1, 1)
        assert table.ssim[name]==pytest.approx(float(piq.ssim(test_images, repeated)), abs=1e-4)
        assert table.mae[name]==pytest.approx(float((test_images-repeated).abs().mean()), abs=1e-5)
        assert table.ssim[name]>10*table.ssim['noise']                  # why noise is no sufficient baseline
    beside = read_table(run, 'baseline_comparison')
    assert set(beside.baseline[beside.model=='gan'])=={'noise', 'flat_gray', 'mean_image'}
    assert set(beside.baseline[beside.model=='flux'])=={'noise_mask', 'mean_fill', 'telea'}
    for o in beside.itertuples():
        assert o.baseline_score==pytest.approx(table.loc[o.baseline, o.metric], rel=1e-4, abs=1e-6)
        lower_is_better = o.metric.startswith('mmd')
        assert o.baseline_is_better==(o.baseline_score<o.score if lower_is_better else o.baseline_score>o.score)

def test_the_untrained_model_is_never_the_best_checkpoint():
    "Epoch 0 has the best score by every metric, on the test and on the validation images"
    columns = ['model', 'source', 'epoch', 'n_pairs', 'ssim', 'ms_ssim', 'mmd2', 'mmd2_paper_unit_sigma10']
    rows = [('gan', source, epoch, 9, 1-epoch/100, 1-epoch/100, epoch/100, epoch/100)
            for source in ('samples', 'validation') for epoch in (0, 10, 20)]
    rows.append(('untrained', 'samples', 0, 9, .9, .9, .01, .01))
    summary = pd.DataFrame(rows, columns=columns)
    noise = summary[['model', 'epoch']].drop_duplicates().assign(ssim=.1, ms_ssim=.1, mmd2=1., mmd2_paper_unit_sigma10=1.)
    best = best_checkpoints(summary, noise, [])
    assert set(best.model)=={'gan'} and set(best.epoch)=={10}
    selection = checkpoint_selection(summary)
    assert set(selection.model)=={'gan'}
    assert selection[['best_epoch', 'selected_epoch', 'last_epoch']].drop_duplicates().values.tolist()==[[10, 10, 20]]
    assert selected_epoch(summary, 'gan')==10 and selected_epoch(summary, 'untrained') is None
    ends = final_checkpoints(summary).set_index(['model', 'epoch']).checkpoint
    assert ends.to_dict()=={('gan', 10): 'selected', ('gan', 20): 'last', ('untrained', 0): 'untrained'}
    gray = best[['model', 'epoch']].drop_duplicates().assign(baseline='flat_gray', ssim=.95, ms_ssim=.2, mmd2=.05, mmd2_paper_unit_sigma10=.5)
    beside = baseline_comparison(best, gray, summary).set_index(['metric', 'baseline'])
    assert beside.baseline_is_better['ssim', 'flat_gray'] and beside.baseline_is_better['mmd2', 'flat_gray']
    assert not beside.baseline_is_better['ms_ssim', 'flat_gray']
    assert beside.xs('untrained', level='baseline').baseline_is_better.all()

def test_damaged_scores_are_made_anew(tmp_path, monkeypatch, capsys):
    "Every kind of file that the stage reads again: the tables are as before, and a sentence names the file"
    for module in metrics, extractors: monkeypatch.setattr(module, 'features', mean_gray_features)
    folder = write_run(tmp_path/'run', n=3)
    for _ in range(2): score(folder)
    assert 'damaged' not in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in (folder/'metrics').glob('*.csv')}
    epochs = folder/'metrics'/'epochs'
    one_bit = lambda content: content[:-20]+bytes([content[-20]^1])+content[-19:]
    damages = [(epochs/'gan_samples_0010.csv', one_bit), (epochs/'flux_raw_0010.npy', one_bit),
               (epochs/'telea.set_metrics.csv', one_bit), (epochs/'noise.json', lambda c: c.replace(b'"ssim": 0.', b'"ssim": 0.9')),
               (epochs/'flat_gray.json', lambda c: c[:40]), (epochs/'real_test.npz', lambda c: c[:900]),
               (folder/'metrics'/'upsampling.csv', one_bit), (folder/'metrics'/'features', None)]
    for path, damage in damages:
        if damage is None: path = sorted(path.iterdir())[0]
        content = path.read_bytes()
        path.write_bytes(content[:50] if damage is None else damage(content))
        assert path.read_bytes()!=content
    (folder/'metrics'/'upsampling.json').write_text('{"models"')
    score(folder)
    said = capsys.readouterr().out
    names = ['gan_samples_0010', 'flux_raw_0010', 'telea', 'noise', 'flat_gray', 'real_test.npz', 'upsampling.csv']
    assert [name for name in names if not any(name in line and 'damaged' in line for line in said.splitlines())]==[]
    after = {p.name: p.read_bytes() for p in (folder/'metrics').glob('*.csv')}
    assert [name for name in before if before[name]!=after[name]]==[]

def test_no_cell_of_a_table_is_a_formula(tmp_path, monkeypatch):
    "Images and models may have names that a spreadsheet would run; the scores are as for other names"
    for module in metrics, extractors: monkeypatch.setattr(module, 'features', mean_gray_features)
    folder, plain = write_run(tmp_path/'run', n=3, prefix='=1+'), write_run(tmp_path/'plain', n=3)
    (folder/'gan').rename(folder/'@gan')
    score(folder, ['@gan', 'flux'], statistics=run_statistics)
    score(plain, statistics=run_statistics)
    for path in (folder/'metrics').rglob('*.csv'):
        with path.open(newline='') as file:
            for row in csv.reader(file):
                assert [cell for cell in row if re.match(r'[=@+\t\r]|-(?![\d.])', cell) and cell!='-']==[], path.name
    assert "'=1+0__normal" in (folder/'metrics'/'scores.csv').read_text()
    for name in 'summary', 'best_checkpoints':
        assert np.allclose(read_table(folder, name).select_dtypes('number'), read_table(plain, name).select_dtypes('number'), equal_nan=True)

def test_models_whose_names_contain_dots_keep_their_own_scores(tmp_path, monkeypatch):
    "`gan.v1` and `gan.v2` were written to one file"
    for module in metrics, extractors: monkeypatch.setattr(module, 'features', mean_gray_features)
    folder = write_run(tmp_path/'run', n=3)
    for i in (1, 2): shutil.copytree(folder/'gan', folder/f'gan.v{i}')
    for path in (folder/'gan.v2'/'samples'/'0010').glob('*.png'): write_png(path, 255-cv2.imread(str(path), 0))
    score(folder, ['gan', 'gan.v1', 'gan.v2'])
    scores = read_table(folder, 'summary').set_index('model').ssim
    assert scores['gan.v1']==scores['gan']!=scores['gan.v2']

def test_statistics_of_a_run(run):
    kwargs = dict(keep_default_na=False, na_values=[''])
    intervals = read_table(run, 'confidence_intervals', **kwargs)
    tests = read_table(run, 'significance_tests', **kwargs)
    mmd = read_table(run, 'mmd_intervals', **kwargs)
    gan = intervals[(intervals.model=='gan')&(intervals.metric=='ssim')].iloc[0]
    assert gan.ci_low<gan['mean']<gan.ci_high
    assert (gan.n_pairs, gan.n_patients, gan.checkpoint, gan.region)==(20, 10, 'last', 'full image')
    summary = read_table(run, 'summary').set_index('model')
    assert np.isclose(gan['mean'], summary.ssim['gan'], atol=1e-5)
    regions = set(intervals.region[intervals.model=='flux'])
    assert regions=={'inside', 'boundary', 'outside', 'full image'}

    task = read_table(run, 'baselines').set_index('baseline').task.to_dict()
    task |= {'gan': 'full image', 'flux': 'inpainting'}
    assert len(tests) and (tests.p_holm>=tests.p-1e-12).all()
    for o in tests.itertuples(): assert task[o.model_a]==task[o.model_b]==o.task
    compared = {tuple(o) for o in tests[['model_a', 'model_b']].to_numpy()}
    assert compared=={('gan', 'other_real'), ('flux', 'telea')}

    by_model = mmd[mmd.source!='raw'].set_index(['model', 'convention'])
    noise = by_model.loc[('noise', 'median')]
    assert noise.p<.05 and noise.equivalent==False
    assert by_model.test['flux', 'median']=='paired permutation'
    assert by_model.test['gan', 'median']=='permutation'
    assert set(mmd.convention)==set(MMD_CONVENTIONS) and (mmd.ci_low<mmd.estimate).all()
    trends = read_table(run, 'trends')
    assert trends.reason.str.contains('too few trained checkpoints for a trend').all()

    diversity, sets = read_table(run, 'fidelity_diversity'), read_table(run, 'set_metrics')
    keys = ['model', 'source', 'epoch', 'metric']
    both = diversity.merge(sets, on=keys, suffixes=('', '_of_sets'))
    assert len(both)==len(diversity)==5*3                           # gan, flux and raw flux
    assert np.allclose(both.value, both.value_of_sets, rtol=1e-4)
    varying = diversity[diversity.reason.isna()]
    assert (varying.ci_low<varying.value).all() and (varying.value<varying.ci_high).all()
    assert set(varying.metric)>={'vendi'}
    assert diversity.se[diversity.reason.notna()].isna().all()

def test_noise_score_is_of_the_pairs_that_a_model_covers(run, tmp_path):
    folder = tmp_path/'run'
    shutil.copytree(run, folder)
    for i in range(8): (folder/'gan'/'samples'/'0010'/f'f{i}__normal.png').unlink()
    score(folder)
    best = read_table(folder, 'best_checkpoints').set_index(['model', 'metric'])
    noise_ssim = read_table(folder, 'epochs/noise').ssim[8:].mean()
    epochs = folder/'metrics'/'epochs'
    fx, fy = np.load(epochs/'real_test.npz')['features'][8:], np.load(epochs/'noise.npy')[8:]
    assert best.n_pairs['gan', 'ssim']==12
    assert np.isclose(best.noise_score['gan', 'ssim'], noise_ssim, atol=1e-6)
    noise_mmd = mmd2(fx, fy, 'paper_unit_sigma10')
    assert np.isclose(best.noise_score['gan', 'mmd2_paper_unit_sigma10'], noise_mmd, rtol=1e-4)
    improvement = best.score['gan', 'ssim']/noise_ssim
    assert np.isclose(best.noise_improvement['gan', 'ssim'], improvement, rtol=1e-3)

def mean_gray_features(images, *args):
    "Means of 8 x 8 squares instead of a network's features: an interruption is not about the network"
    x = torch.as_tensor(np.asarray(images), dtype=torch.float32)[:, None]
    return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1).numpy()

def files_of(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

def killed_after_three_batches(folder):
    "Score a run in a forked process that kills itself; its exit status"
    score_batch, left = metrics.score_batch, [3]
    def score_three_batches(*args):
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        score_batch(*args)
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1]
    try:
        metrics.score_batch = score_three_batches
        score(folder, statistics=run_statistics)
    finally: os._exit(0)

def test_an_interrupted_run_repeats_one_batch_at_most(tmp_path, monkeypatch):
    for module in metrics, extractors: monkeypatch.setattr(module, 'features', mean_gray_features)
    monkeypatch.setattr(metrics, 'BATCH_SIZE', 3)
    monkeypatch.setattr(metrics, 'parallel_map', lambda f, items, n=0: map(f, items))  # no threads in a fork
    monkeypatch.setattr(importlib.import_module('elbowsynth.evaluation.ssim'), 'parallel_map', lambda f, items, n=0: map(f, items))
    folder, undisturbed = write_run(tmp_path/'run', n=6), tmp_path/'undisturbed'
    shutil.copytree(folder, undisturbed)
    score(undisturbed, statistics=run_statistics)
    status = killed_after_three_batches(folder)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status)==signal.SIGKILL
    assert len(list((folder/'metrics').rglob('*.npz')))>=1 and not (folder/'metrics'/'metrics.json').exists()
    scored, score_batch = [], metrics.score_batch
    def counted(path, *args):
        scored.append(path)
        score_batch(path, *args)
    monkeypatch.setattr(metrics, 'score_batch', counted)
    score(folder, statistics=run_statistics)
    # two batches for each of three checkpoints and seven baselines, of which three were finished
    assert len(scored)==2*(3+7)-3
    names = {path.relative_to(folder) for path in folder.rglob('*.parts')}
    after, expected = files_of(folder/'metrics'), files_of(undisturbed/'metrics')
    archives = [path for path in expected if path.suffix=='.npz']       # they contain the time
    for path in archives: assert_same_arrays(folder/'metrics'/path, undisturbed/'metrics'/path)
    assert set(after)==set(expected) and names==set()
    assert [path for path in expected if path not in archives and after[path]!=expected[path]]==[]

def assert_same_arrays(path, other):
    arrays, others = load_arrays(path), load_arrays(other)
    assert set(arrays)==set(others) and all((arrays[k]==others[k]).all() for k in arrays)

@pytest.mark.long('scores several runs, 12 s')
def test_only_new_checkpoints_are_scored(run):
    first = json.loads((run/'metrics'/'metrics.json').read_text())
    before = modification_times(run)
    shutil.copytree(run/'gan'/'samples'/'0010', run/'gan'/'samples'/'0020')
    try: again = score(run, statistics=run_statistics)
    finally: shutil.rmtree(run/'gan'/'samples'/'0020')
    changed = {n.split('.')[0] for n,t in modification_times(run).items() if before.get(n)!=t}
    assert changed=={'gan_samples_0020'}
    assert again==first

# --- Scores in parts

def without_times(folder):
    "Files of the stage; archives contain the time"
    return {path: content for path,content in files_of(folder).items() if path.suffix!='.npz'}

@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    "A run with three checkpoints, not scored, and a copy that one call has scored"
    for module in metrics, extractors: monkeypatch.setattr(module, 'features', mean_gray_features)
    monkeypatch.setattr(metrics, 'BATCH_SIZE', 4)
    monkeypatch.setattr(metrics, 'parallel_map', lambda f, items, n=0: map(f, items))  # no threads in a fork
    monkeypatch.setattr(importlib.import_module('elbowsynth.evaluation.ssim'), 'parallel_map', lambda f, items, n=0: map(f, items))
    folder, at_once = write_run(tmp_path/'run', n=6), tmp_path/'at once'
    for output in ('samples', 'validation'):
        shutil.copytree(folder/'gan'/'samples'/'0010', folder/'gan'/output/'0020', dirs_exist_ok=True)
    for path in (folder/'gan'/'validation'/'0020').iterdir(): path.rename(path.with_name(f'f{int(path.name[1])+6}__normal.png'))
    shutil.copytree(folder, at_once)
    score(at_once, statistics=run_statistics)
    return folder, at_once

@pytest.mark.parametrize('order', [['flux/0010', 'gan/0010', 'gan/0020'], ['gan/0020', 'flux/0010', 'flux/0010']], ids=['all', 'not all'])
def test_parts_in_any_order_give_the_tables_of_one_call(order, in_parts, monkeypatch):
    folder, at_once = in_parts
    for name in order:
        score(folder, only_checkpoints=[name])
        assert [p.name for p in (folder/'metrics').iterdir() if p.is_file()]==[]
    scored, score_batch = [], metrics.score_batch
    def counted(path, *args):
        scored.append(path.parent.name.removesuffix('.parts'))
        score_batch(path, *args)
    monkeypatch.setattr(metrics, 'score_batch', counted)
    score(folder, statistics=run_statistics)
    again = {name for name in scored if name.split('_')[0] in ('gan', 'flux')}
    assert again==(set() if len(set(order))==3 else {'gan_samples_0010'}) and 'telea' in scored
    assert without_times(folder/'metrics')==without_times(at_once/'metrics')

def test_two_parts_at_once_do_not_harm_each_other(in_parts):
    "Both compute the features of the same real images, and of different validation images"
    folder, at_once = in_parts
    start, go = os.pipe()
    pids = []
    for name in ('gan/0020', 'flux/0010'):
        pid = os.fork()
        if pid==0:
            status = 1
            try:
                os.close(go)
                os.read(start, 1)                                   # until the other exists, too
                score(folder, only_checkpoints=[name])
                status = 0
            finally: os._exit(status)
        pids.append(pid)
    os.close(go)
    assert [os.waitpid(pid, 0)[1] for pid in pids]==[0, 0]
    os.close(start)
    score(folder, statistics=run_statistics)
    assert without_times(folder/'metrics')==without_times(at_once/'metrics')

def test_a_checkpoint_without_images_is_refused(in_parts):
    folder, _ = in_parts
    with pytest.raises(FileNotFoundError, match='only_checkpoints: flux/0040, gan/10 has no images; expected MODEL/EPOCH.*fix:'):
        score(folder, only_checkpoints=['gan/0010', 'gan/10', 'flux/0040'])
    assert not (folder/'metrics').exists()
