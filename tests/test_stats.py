"Intervals that cover, p-values that are uniform, and the opinions of scipy and scikit-learn"
import itertools
import numpy as np
import pytest
import torch
from scipy import stats as sp
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from elbowsynth.evaluation.mmd import mmd2, prdc, vendi
from elbowsynth.evaluation.stats import (
    between_group_kernel_sums, cluster_bootstrap, cluster_mean, cluster_subsampling,
    clustered_wilcoxon, cubic_kernel, gaussian_kernel, holm_correction, mmd_jackknife,
    paired_permutation_test, paired_test, paired_tests, permutation_test, set_trend, tost,
    trend_test)

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def scores(c, rng, patient=.05, film=.03, pair=.02, skewed=False):
    "Scores of mean .5, names of patients and films"
    p = np.repeat(np.arange(c), rng.integers(1, 4, c))
    f = np.repeat(np.arange(len(p)), rng.integers(1, 4, len(p)))
    p = p[f]
    own = 1-rng.exponential(size=c) if skewed else rng.normal(size=c)
    return .5+patient*own[p]+film*rng.normal(size=f.max()+1)[f]+pair*rng.normal(size=len(f)), p, f

def clouds(c, d, rng, delta=0., films=2, kin=.5, spread=1.):
    "Vectors of unit variance, `kin` of it the patient's own"
    at = np.repeat(np.arange(c), films)
    z = spread*(np.sqrt(kin)*rng.normal(size=(c, d))[at]+np.sqrt(1-kin)*rng.normal(size=(len(at), d)))
    z[:, 0] += delta
    return z, at

def true_mmd2(d, sigma, delta): return 2*(sigma**2/(sigma**2+2))**(d/2)*(1-np.exp(-delta**2/(2*(sigma**2+2))))

def holds(o, truth): return o['low']<=truth<=o['high']

def uniform(p, discrete=0.):
    "p-values of a true null: no level is exceeded by more than chance, and the levels are used"
    p = np.asarray(p)
    for level in (.05, .1, .2, .5): assert abs((p<=level+1e-9).mean()-level)<4*np.sqrt(level*(1-level)/len(p))+discrete, (level, (p<=level).mean())
    return True

# --- means

def test_bootstrap_of_whole_patients_covers():
    "Each case within what 1200 repetitions can tell, all together between 93 and 97 %"
    share = []
    for c, skewed in ((25, False), (60, False), (150, False), (100, True)):
        rng = np.random.default_rng(c)
        share.append(np.mean([holds(cluster_bootstrap(*scores(c, rng, skewed=skewed)[:2], n_resamples=500, seed=i), .5) for i in range(1200)]))
    assert min(share)>.92 and max(share)<.98 and .93<=np.mean(share)<=.97, share

def test_pairs_as_units_do_not_cover_and_all_levels_cover_too_much():
    rng, pairs, deep = np.random.default_rng(0), [], []
    for i in range(300):
        v, p, f = scores(40, rng, patient=.02)
        pairs.append(holds(cluster_bootstrap(v, n_resamples=300, seed=i), .5))
        deep.append(holds(cluster_bootstrap(v, p, f, nested=True, n_resamples=300, seed=i), .5))
    assert np.mean(pairs)<.85 and np.mean(deep)>.965

def test_bootstrap_of_a_ratio_covers():
    rng, hits = np.random.default_rng(1), []
    for i in range(800):
        v, p, _ = scores(60, rng)
        o = cluster_bootstrap(np.c_[v, .25+.1*(v-.5)+.01*rng.normal(size=len(v))], p, statistic=lambda m: m[..., 0]/m[..., 1], n_resamples=500, seed=i)
        hits.append(holds(o, 2))
    assert .93<=np.mean(hits)<=.97, np.mean(hits)

def test_bootstrap_agrees_with_the_formula_and_with_scipy():
    v, p, f = scores(200, np.random.default_rng(2))
    assert np.isclose(cluster_bootstrap(v, p, n_resamples=8000)['se'], cluster_mean(v, p)['se'], rtol=.03)
    theirs = sp.bootstrap((v,), np.mean, n_resamples=4000, method='percentile', rng=np.random.default_rng(0)).confidence_interval
    ours = cluster_bootstrap(v, n_resamples=4000)
    assert np.allclose([ours['low'], ours['high']], theirs, atol=.0008)
    again = np.random.default_rng(3).permutation(len(v))
    assert np.isclose(cluster_bootstrap(v[again], p[again], f[again], nested=True)['estimate'], v.mean())

def test_deep_draws_follow_the_hierarchy():
    "Variance of the deep bootstrap of balanced data, by the formula for nested draws"
    rng = np.random.default_rng(4)
    v = rng.normal(size=(30, 2, 3))+rng.normal(size=(30, 2, 1))+rng.normal(size=(30, 1, 1))
    p, f = np.repeat(np.arange(30), 6), np.repeat(np.arange(60), 3)
    by_hand = v.mean((1, 2)).var()/30 + v.mean(2).var(1).mean()/60 + v.var(2).mean()/180
    assert np.isclose(cluster_bootstrap(v.ravel(), p, f, nested=True, n_resamples=6000)['se']**2, by_hand, rtol=.06)

def test_bad_input_is_named():
    for call, text in ((lambda: cluster_bootstrap([.1, np.nan]), 'value 1 is not finite'), (lambda: cluster_bootstrap([]), 'n > 0'), (lambda: cluster_bootstrap([1., 2.], ['a', 'a']), '1 independent groups'),
                       (lambda: cluster_bootstrap([1., 2.], [1., np.nan]), 'row 1 has no group'), (lambda: cluster_bootstrap([1., 2.], level=95), 'level is 95'),
                       (lambda: mmd_jackknife(np.zeros((3, 2)), np.zeros((3, 3)), cubic_kernel), 'features want'), (lambda: paired_permutation_test(np.zeros((3, 2)), np.zeros((4, 2)), cubic_kernel), 'not pairs'),
                       (lambda: trend_test([[1., 2., 3.]]*2, [0, 2, 1]), 'rising epochs'), (lambda: paired_test([1., np.inf], [0., 0.]), 'value 1 is not finite')):
        with pytest.raises(ValueError, match=text): call()

# --- distances between sets

def test_estimates_equal_scikit_learn():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(40, 6)), rng.normal(.3, 1, (30, 6))
    for kernel, theirs in ((gaussian_kernel(2.), lambda a, b: rbf_kernel(a, b, gamma=1/8)), (cubic_kernel, lambda a, b: polynomial_kernel(a, b, degree=3, coef0=1))):
        xx, yy, xy = theirs(x, x), theirs(y, y), theirs(x, y)
        u = (xx.sum()-np.trace(xx))/(40*39)+(yy.sum()-np.trace(yy))/(30*29)-2*xy.mean()
        assert np.isclose(mmd_jackknife(x, y, kernel)['estimate'], u, atol=1e-12)
        assert np.isclose(permutation_test(x, y, kernel, n_resamples=9)['mmd2'], u, atol=1e-12)
    assert np.isclose(mmd_jackknife(x, y, gaussian_kernel(np.median(np.sqrt(((x[:, None]-x)**2).sum(-1))[np.triu_indices(40, 1)])))['estimate'], mmd2(x, y), atol=1e-10)

def brute(x, y, gx, gy, k):
    "MMD² over vectors of different patients, term by term"
    def mean(a, b, ga, gb):
        terms = [k(u, v) for (u, i), (v, j) in itertools.product(zip(a, ga), zip(b, gb)) if i!=j]
        return sum(terms)/len(terms)
    return mean(x, x, gx, gx)+mean(y, y, gy, gy)-2*mean(x, y, gx, gy)

@pytest.mark.parametrize('shared', [True, False])
def test_jackknife_equals_leaving_out_by_hand(shared):
    rng = np.random.default_rng(6)
    x, y, gx = rng.normal(size=(9, 3)), rng.normal(.4, 1, (8, 3)), np.array(list('aabcccdde'))
    gy = np.array(list('aabbcdee')) if shared else np.array(list('ttuuvwzz'))
    k = lambda u, v: np.exp(-((u-v)**2).sum()/2)
    o = mmd_jackknife(x, y, gaussian_kernel(1.), gx, gy, block_size=4)
    assert np.isclose(o['estimate'], brute(x, y, gx, gy, k), atol=1e-12)
    names = sorted({*gx, *gy})
    left = np.array([brute(x[gx!=n], y[gy!=n], gx[gx!=n], gy[gy!=n], k) for n in names])
    assert np.isclose(o['se'], np.sqrt((len(names)-1)/len(names)*((left-o['estimate'])**2).sum()), atol=1e-12)

def test_small_distances_survive_single_precision():
    "Unit vectors, bandwidth 10, values of 1e-6: the paper's likeliest convention"
    rng = np.random.default_rng(7)
    x, y = (np.abs(rng.normal(1, .3, (400, 256)))+o for o in (0, .01))
    exact, single = (mmd_jackknife(x.astype(t), y.astype(t), gaussian_kernel(10., normalize=True)) for t in (np.float64, np.float32))
    assert abs(single['estimate']-exact['estimate'])<1e-9+.01*exact['se'] and np.isclose(single['se'], exact['se'], rtol=.01)

@pytest.mark.parametrize('paired', [False, True])
@pytest.mark.parametrize('delta', [.8, 1.5])
def test_mmd_interval_covers(delta, paired):
    rng, d, sigma, hits = np.random.default_rng(8), 16, 4., []
    for _ in range(400):
        x, gx = clouds(50, d, rng)
        y, gy = clouds(50, d, rng, delta)
        if paired: y = np.sqrt(.5)*(x+y*1.)-np.r_[np.sqrt(.5)*delta-delta, np.zeros(d-1)]         # half of each film is its real one; mean and variance as before
        o = mmd_jackknife(x, y, gaussian_kernel(sigma), gx, gx if paired else [f'y{i}' for i in gy])
        hits.append(holds(o, true_mmd2(d, sigma, delta)))
    assert .925<=np.mean(hits)<=.985, np.mean(hits)

def test_mmd_interval_is_wide_where_sets_are_the_same():
    rng, hits = np.random.default_rng(9), []
    for _ in range(300):
        (x, gx), (y, gy) = clouds(50, 16, rng), clouds(50, 16, rng)
        hits.append(holds(mmd_jackknife(x, y, gaussian_kernel(4.), gx, [f'y{i}' for i in gy]), 0))
    assert np.mean(hits)>.96, np.mean(hits)

def test_unnamed_patients_ruin_estimate_and_interval():
    "Each film a second time in the table, as in a set of pairs with several pathologies"
    rng, named, unnamed = np.random.default_rng(10), [], []
    for _ in range(150):
        (x, gx), (y, gy) = clouds(40, 16, rng, films=3, kin=.999), clouds(40, 16, rng, 1., films=3, kin=.999)
        named.append(holds(mmd_jackknife(x, y, gaussian_kernel(4.), gx, [f'y{i}' for i in gy]), true_mmd2(16, 4., 1.)))
        unnamed.append(holds(mmd_jackknife(x, y, gaussian_kernel(4.)), true_mmd2(16, 4., 1.)))
    assert np.mean(named)>.92 and np.mean(unnamed)<.8, (np.mean(named), np.mean(unnamed))

def test_kid_interval_covers():
    "The cubic kernel's true value, from one very large sample"
    rng, d = np.random.default_rng(11), 8
    big = [clouds(6000, d, rng, o, films=1)[0] for o in (0., 1.)]
    truth, hits = mmd_jackknife(*big, cubic_kernel)['estimate'], []
    for _ in range(400):
        (x, gx), (y, gy) = clouds(60, d, rng), clouds(60, d, rng, 1.)
        hits.append(holds(mmd_jackknife(x, y, cubic_kernel, gx, [f'y{i}' for i in gy]), truth))
    assert .92<=np.mean(hits)<=.98, np.mean(hits)

def test_subsampling_covers_vendi_and_neighbours():
    "The library's own functions; measured shares stand on the page"
    rng, v, n = np.random.default_rng(12), [], []
    positive = lambda z: np.maximum(z+1, 0)                               # as features are
    neighbours = lambda x, y: np.array(list(prdc(x, y).values()))
    draw = lambda delta=0.: (lambda z, g: (positive(z), g))(*clouds(60, 8, rng, delta))
    truth_v = np.mean([vendi(draw()[0]) for _ in range(200)])
    truth_n = np.mean([neighbours(draw()[0], draw(1.)[0]) for _ in range(200)], 0)
    for i in range(200):
        (x, gx), (y, gy) = draw(), draw(1.)
        v.append(holds(cluster_subsampling(vendi, x, groups_x=gx, n_resamples=60, seed=i), truth_v))
        o = cluster_subsampling(neighbours, x, y, gx, [f'y{j}' for j in gy], n_resamples=60, seed=i)
        n.append((o['low']<=truth_n)&(truth_n<=o['high']))
    print('coverage: vendi', np.mean(v), dict(zip(('precision', 'recall', 'density', 'coverage'), np.mean(n, 0))))
    assert .87<=np.mean(v)<=.995 and ((.88<=np.mean(n, 0))&(np.mean(n, 0)<=1)).all(), (np.mean(v), np.mean(n, 0))

# --- tests of difference

def test_permutation_p_is_uniform_and_powerful():
    rng, null, power = np.random.default_rng(13), [], []
    for i in range(400):
        x, gx = clouds(15, 5, rng)
        for out, delta in ((null, 0.), (power, 1.2)):
            y, gy = clouds(15, 5, rng, delta)
            out.append(permutation_test(x, y, gaussian_kernel(3.), gx, [f'y{j}' for j in gy], n_resamples=99, seed=i)['p'])
    assert uniform(null) and (np.array(power)<=.05).mean()>.6

def test_permutation_of_films_instead_of_patients_is_too_bold():
    rng = np.random.default_rng(14)
    p = [permutation_test(clouds(12, 5, rng, films=4)[0], clouds(12, 5, rng, films=4)[0], gaussian_kernel(3.), n_resamples=99, seed=i)['p'] for i in range(150)]
    assert (np.array(p)<=.05).mean()>.15

def test_swap_p_is_uniform_and_powerful():
    rng, null, power = np.random.default_rng(15), [], []
    for i in range(400):
        shared, g = clouds(25, 5, rng)
        x, y = (shared+.3*rng.normal(size=shared.shape) for _ in range(2))
        null.append(paired_permutation_test(x, y, gaussian_kernel(3.), g, n_resamples=99, seed=i)['p'])
        power.append(paired_permutation_test(x, y+np.r_[.25, 0, 0, 0, 0], gaussian_kernel(3.), g, n_resamples=99, seed=i)['p'])
    assert uniform(null) and (np.array(power)<=.05).mean()>.6

def test_permutation_equals_all_deals_by_hand():
    rng = np.random.default_rng(16)
    x, y = rng.normal(size=(4, 2)), rng.normal(.9, 1, (3, 2))
    z, k = np.r_[x, y], lambda u, v: np.exp(-((u-v)**2).sum()/2)
    far = lambda those: brute(z[list(those)], z[[i for i in range(7) if i not in those]], list(those), [i for i in range(7) if i not in those], k)
    every = [far(o) for o in itertools.combinations(range(7), 4)]
    o = permutation_test(x, y, gaussian_kernel(1.), n_resamples=6000)
    assert abs(o['p']-np.mean(np.array(every)>=every[0]-1e-12))<.02 and set(o['null'].round(9))<=set(np.round(every, 9))

# --- paired tests, trends, equivalence

def test_signed_ranks_equal_scipy():
    rng = np.random.default_rng(17)
    for n in (6, 13, 45):
        d = rng.normal(.2, 1, n)
        assert np.isclose(clustered_wilcoxon(d)[1], sp.wilcoxon(d, method='exact').pvalue, rtol=1e-10)
    d = rng.normal(.05, 1, 400).round(2)                                 # ties and zeros
    assert np.isclose(clustered_wilcoxon(d)[1], sp.wilcoxon(d, method='approx', correction=False).pvalue, rtol=1e-9)
    n = np.sum(d!=0)
    assert np.isclose(clustered_wilcoxon(d)[0], 2*sp.wilcoxon(d, alternative='greater').statistic/(n*(n+1)/2)-1)
    tied = np.array([1, 1, -1, 2, 2, 3, -3, 4.])
    assert np.isclose(clustered_wilcoxon(tied)[1], sp.wilcoxon(tied, method=sp.PermutationMethod(n_resamples=np.inf)).pvalue)

def test_many_pairs_of_few_patients_are_few():
    "150 pairs of five patients: two ways of 32 to set the signs are as extreme, and no normal distribution knows"
    d = np.abs(np.random.default_rng(0).normal(1, .2, 150))
    assert np.isclose(clustered_wilcoxon(d, np.repeat(range(5), 30))[1], .0625)
    rng, p = np.random.default_rng(1), []
    for _ in range(400):
        d, g = clouds(7, 1, rng, films=20, kin=.8)
        p.append(clustered_wilcoxon(d[:, 0], g)[1])
    assert (np.array(p)<=.05).mean()<=.08

@pytest.mark.parametrize('c', [12, 70])
def test_signed_rank_p_is_uniform_with_patients_and_too_bold_without(c):
    rng, p, bold = np.random.default_rng(18), [], []
    for _ in range(1500):
        d, g = clouds(c, 1, rng, films=3, kin=.8)
        p.append(clustered_wilcoxon(d[:, 0], g)[1])
        bold.append(clustered_wilcoxon(d[:, 0])[1])
    assert uniform(p, .005) and (np.array(bold)<=.05).mean()>.12

def test_holm_equals_its_definition_and_guards_the_family():
    rng = np.random.default_rng(19)
    for _ in range(50):
        p = rng.random(7)**2
        o = np.sort(p)
        want = {v: min(1, max((7-j)*o[j] for j in range(i+1))) for i, v in enumerate(o)}
        assert np.allclose(holm_correction(p), [want[v] for v in p])
    false = []
    for i in range(150):
        v, g, _ = scores(20, rng)
        own = {(m, k): v+.02*rng.normal(size=len(v)) for m in 'abc' for k in ('ssim', 'ms_ssim')}
        false.append((paired_tests(own, g, draws=10).p_holm<.05).any())
    assert np.mean(false)<.05+3*np.sqrt(.05*.95/150)

def test_paired_tests_use_the_pairs_that_both_have():
    a = np.r_[np.arange(10.), np.nan]
    table = paired_tests({('a', 'ssim'): a, ('b', 'ssim'): a[::-1], ('c', 'ssim'): a+1}, draws=20)
    assert table.n.tolist()==[9, 10, 9] and table[['a', 'b']].to_numpy().tolist()==[['a', 'b'], ['a', 'c'], ['b', 'c']]
    assert np.isclose(table.difference[1], -1) and table.higher[1]==0 and table.rank_biserial[1]==-1

def test_trend_finds_what_is_there():
    rng, epochs, p, hits = np.random.default_rng(20), np.arange(0, 201, 20), [], []
    for i in range(800):
        v, g, _ = scores(50, rng)
        own = .0002*(1+.3*rng.normal(size=50))[g]                       # patients differ in how much they gain
        o = trend_test(v[:, None]+own[:, None]*epochs+.03*rng.normal(size=(len(v), 11)), epochs, g, draws=400, seed=i)
        hits.append(holds(o, .0002))
        p.append(trend_test(v[:, None]+.03*rng.normal(size=(len(v), 11)), epochs, g, draws=5)['p'])
    assert .92<=np.mean(hits)<=.98 and uniform(p), np.mean(hits)

def test_trend_agrees_with_scipy():
    v = np.random.default_rng(21).normal(size=(5, 7)).round(1)
    o = trend_test(v, range(7), draws=5)
    assert np.isclose(o['rank_correlation'], np.mean([sp.spearmanr(range(7), r).statistic for r in v]))
    assert np.isclose(o['slope'], np.mean([sp.linregress(range(7), r).slope for r in v]))
    assert trend_test([[1., 1, 1]]*3, range(3), draws=5)['rank_correlation']==0
    assert np.isclose(set_trend([5., 3, 4, 1], range(4))['p'], sp.kendalltau(range(4), [5., 3, 4, 1]).pvalue)

def test_equivalence_equals_two_t_tests_and_holds_its_level():
    rng = np.random.default_rng(22)
    d = rng.normal(.1, 1, 30)
    low, high = sp.ttest_1samp(d, -.5, alternative='greater').pvalue, sp.ttest_1samp(d, .5, alternative='less').pvalue
    assert np.isclose(tost(d, .5)['p'], max(low, high))
    at_margin = []
    for _ in range(1500):
        v, g, _ = scores(40, rng)
        at_margin.append(tost(v-.5+.03, .03, g)['equivalent'])
    assert abs(np.mean(at_margin)-.05)<.025
    o = tost(d, .5)
    assert o['equivalent']==(-.5<o['low'] and o['high']<.5)

def test_blocks_do_not_matter():
    z = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g, w = torch.arange(50)//3, torch.ones(50, 2, dtype=torch.float64)
    whole = between_group_kernel_sums(z, g, w, gaussian_kernel(1.))
    for block in (1, 7, 49): assert torch.allclose(between_group_kernel_sums(z, g, w, gaussian_kernel(1.), block), whole, atol=1e-12)

# --- which convention, and what metrics see

def test_bounds_for_noise_hold_in_the_libraries_they_speak_of():
    import piq
    from skimage.metrics import structural_similarity
    from elbowsynth.evaluation.conventions import max_ssim_of_noise
    from elbowsynth.phantom.phantom import phantom
    rng = np.random.default_rng(23)
    for film in (np.full((1024, 1024), .5), phantom('LAT', ['normal'], size=1024).image/255):
        noise = rng.random(film.shape)
        a, b = (torch.tensor(o)[None, None] for o in (film, noise))
        assert piq.ssim(a, b)<max_ssim_of_noise(4) and piq.ssim(a, b, downsample=False)<max_ssim_of_noise()
        assert structural_similarity(film, noise, data_range=2)<max_ssim_of_noise(data_range=2) and structural_similarity(255*film, 255*noise, data_range=1)<max_ssim_of_noise(actual_range=255)
        assert structural_similarity(film, noise, data_range=255)>.9

def test_bounds_for_mmd_hold():
    from elbowsynth.evaluation.conventions import bandwidth_for, max_mmd
    rng = np.random.default_rng(24)
    for _ in range(50):
        x, y = (np.maximum(rng.normal(rng.normal(), 1, (20, 30)), 0)+1e-9 for _ in 'xy')
        x, y = (o/np.linalg.norm(o, axis=1, keepdims=True) for o in (x, y))
        for gamma in (1/200, 1/30, 1.):
            v = rbf_kernel(x, x, gamma=gamma).mean()+rbf_kernel(y, y, gamma=gamma).mean()-2*rbf_kernel(x, y, gamma=gamma).mean()
            assert v<=max_mmd(gamma, 2)
        gap = ((x.mean(0)-y.mean(0))**2).sum()
        assert np.isclose(bandwidth_for(mmd2(x, y, 'paper_A'), gap), 10, rtol=.02)     # wide kernels measure the gap, and so the bandwidth can be read off

def test_the_paper_agrees_with_itself_and_leaves_five_conventions():
    from elbowsynth.paper import table1_rows
    from elbowsynth.evaluation.conventions import (
        implied_in_mask_score, implied_mask_area, implied_noise, possible_conventions)
    t = implied_noise(table1_rows())
    of = {(o.metric, o.kind): o.noise for o in t.itertuples()}
    assert t.agree.all() and len(t)==6
    assert np.isclose(of['mmd', 'noise'], 6.497e-3, rtol=1e-3) and np.isclose(of['mmd', 'mask'], 2.935e-3, rtol=1e-3)
    share = implied_mask_area(of['ssim', 'mask'], of['ssim', 'noise'])
    assert np.isclose((1-share)+share*implied_in_mask_score(.8, share), .8)
    assert not implied_noise([*table1_rows(), ('ssim', 'other', 'noise', .4, 2., 5e-4)]).agree.all()
    claims = {('ssim', 'noise'): of['ssim', 'noise'], ('ms_ssim', 'noise'): of['ms_ssim', 'noise'], ('mmd', 'noise'): of['mmd', 'noise'], ('mmd', 'best'): 1.373e-4}
    found = possible_conventions(claims, 1024, 898, 2048, (.3, 1.5))
    assert found.possible.sum()==5 and set(found.claim[found.possible])=={'ssim of noise', 'ms_ssim of noise', 'mmd of noise'}
    assert possible_conventions(claims | {('ssim', 'noise'): .005}, 256, 898, 2048, (.3, 1.5)).possible[:2].all()      # at 256 pixels nothing is pooled: both piq's fit a small claim

def test_damages_do_what_they_say():
    from elbowsynth.evaluation.sensitivity import distort, DISTORTIONS, memorization_rate
    rng = np.random.default_rng(25)
    films, masks = rng.integers(60, 190, (2, 40, 40), np.uint8), np.zeros((2, 40, 40), np.uint8)
    masks[:, 10:30, 10:30] = 255
    before = films.copy()
    for k, (_, amounts, _) in DISTORTIONS.items():
        off = [np.abs(distort(films, masks, k, a).astype(int)-films).mean() for a in (0, *amounts)]
        assert off[0]==0 and min(off[1:])>0 and (k=='shift' or (np.diff(off)>0).all())
        out = distort(films, masks, k, amounts[-1])
        assert out.dtype==np.uint8 and ((out==films)[masks==0].all())==(k in ('seam', 'blur in mask'))
    assert (films==before).all() and (distort(films, masks, 'shift', 3)[:, :, 3:]==films[:, :, :-3]).all()
    train = rng.normal(size=(30, 5))
    assert memorization_rate(train, train)==1 and memorization_rate(train, train+10)==0
