"Coverage of confidence intervals, uniform p-values, and comparisons with scipy and scikit-learn"
import itertools
import numpy as np
import pytest
import torch
from scipy import stats as sp
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from elbowsynth.evaluation.mmd import cubic_kernel, gaussian_kernel, mmd2, prdc, vendi
from elbowsynth.evaluation.stats import (
    between_group_kernel_sums, cluster_bootstrap, cluster_mean, cluster_subsampling,
    clustered_wilcoxon, holm_correction, mmd_jackknife, paired_permutation_test, paired_test,
    paired_tests, permutation_test, set_trend, tost, trend_test)

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def simulated_scores(n_patients, rng, patient=.05, image=.03, pair=.02, skewed=False):
    "Scores with mean .5 and these standard deviations, names of patients and of images"
    patients = np.repeat(np.arange(n_patients), rng.integers(1, 4, n_patients))
    images = np.repeat(np.arange(len(patients)), rng.integers(1, 4, len(patients)))
    patients = patients[images]
    if skewed: patient_effect = 1-rng.exponential(size=n_patients)
    else: patient_effect = rng.normal(size=n_patients)
    image_effect = rng.normal(size=images.max()+1)
    pair_effect = rng.normal(size=len(images))
    scores = .5+patient*patient_effect[patients]+image*image_effect[images]+pair*pair_effect
    return scores, patients, images

def simulated_vectors(n_patients, d, rng, delta=0., n_images=2, shared=.5, spread=1.):
    "Vectors of unit variance, a fraction of it shared within a patient, and their patients"
    patients = np.repeat(np.arange(n_patients), n_images)
    of_patient = np.sqrt(shared)*rng.normal(size=(n_patients, d))[patients]
    of_image = np.sqrt(1-shared)*rng.normal(size=(len(patients), d))
    vectors = spread*(of_patient+of_image)
    vectors[:, 0] += delta
    return vectors, patients

def other_names(patients):
    "Names of patients who are not in the first set"
    return [f'y{i}' for i in patients]

def true_mmd2(d, sigma, delta):
    "MMD² of normal vectors of unit variance in d dimensions whose means are delta apart"
    return 2*(sigma**2/(sigma**2+2))**(d/2)*(1-np.exp(-delta**2/(2*(sigma**2+2))))

def covers(interval, truth): return interval['ci_low']<=truth<=interval['ci_high']

def fraction_below(p_values, level): return (np.asarray(p_values)<=level+1e-9).mean()

def is_uniform(p_values, discrete=0.):
    "p-values of a true null: each level is exceeded as often as it should be, up to chance"
    for level in (.05, .1, .2, .5):
        tolerance = 4*np.sqrt(level*(1-level)/len(p_values))+discrete
        fraction = fraction_below(p_values, level)
        assert abs(fraction-level)<tolerance, (level, fraction)
    return True

# --- means

def test_bootstrap_of_patients_covers():
    "Each case within the error of 500 repetitions, their mean between 93 and 97 %"
    coverage = []
    for n_patients, skewed in ((12, False), (40, False), (100, True)):
        rng = np.random.default_rng(n_patients)
        hits = []
        for seed in range(500):
            scores, patients, _ = simulated_scores(n_patients, rng, skewed=skewed)
            interval = cluster_bootstrap(scores, patients, n_resamples=250, seed=seed)
            hits.append(covers(interval, .5))
        coverage.append(np.mean(hits))
    assert min(coverage)>.92 and max(coverage)<.98, coverage
    assert .93<=np.mean(coverage)<=.97, coverage

@pytest.mark.long('hundreds of simulated studies, 9 s')
def test_bootstrap_of_pairs_is_too_narrow_and_nested_bootstrap_too_wide():
    rng = np.random.default_rng(0)
    by_pair, nested = [], []
    for seed in range(300):
        scores, patients, images = simulated_scores(40, rng, patient=.02)
        interval = cluster_bootstrap(scores, n_resamples=300, seed=seed)
        by_pair.append(covers(interval, .5))
        interval = cluster_bootstrap(
            scores, patients, images, nested=True, n_resamples=300, seed=seed)
        nested.append(covers(interval, .5))
    assert np.mean(by_pair)<.85
    assert np.mean(nested)>.965

def test_bootstrap_of_a_ratio_covers():
    rng = np.random.default_rng(1)
    hits = []
    for seed in range(800):
        scores, patients, _ = simulated_scores(60, rng)
        noise = .25+.1*(scores-.5)+.01*rng.normal(size=len(scores))
        interval = cluster_bootstrap(
            np.c_[scores, noise], patients, statistic=lambda m: m[..., 0]/m[..., 1],
            n_resamples=500, seed=seed)
        hits.append(covers(interval, 2))
    assert .93<=np.mean(hits)<=.97, np.mean(hits)

def test_bootstrap_agrees_with_the_formula_and_with_scipy():
    scores, patients, images = simulated_scores(200, np.random.default_rng(2))
    se = cluster_bootstrap(scores, patients, n_resamples=8000)['se']
    assert np.isclose(se, cluster_mean(scores, patients)['se'], rtol=.03)
    theirs = sp.bootstrap(
        (scores,), np.mean, n_resamples=4000, method='percentile',
        rng=np.random.default_rng(0)).confidence_interval
    ours = cluster_bootstrap(scores, n_resamples=4000)
    assert np.allclose([ours['ci_low'], ours['ci_high']], theirs, atol=.0008)
    order = np.random.default_rng(3).permutation(len(scores))
    nested = cluster_bootstrap(scores[order], patients[order], images[order], nested=True)
    assert np.isclose(nested['estimate'], scores.mean())

def test_nested_bootstrap_follows_the_hierarchy():
    "Variance of the nested bootstrap of balanced data, by the formula for nested resampling"
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(30, 2, 3))+rng.normal(size=(30, 2, 1))+rng.normal(size=(30, 1, 1))
    patients, images = np.repeat(np.arange(30), 6), np.repeat(np.arange(60), 3)
    between_patients = scores.mean((1, 2)).var()/30
    between_images = scores.mean(2).var(1).mean()/60
    between_pairs = scores.var(2).mean()/180
    by_hand = between_patients+between_images+between_pairs
    nested = cluster_bootstrap(scores.ravel(), patients, images, nested=True, n_resamples=6000)
    assert np.isclose(nested['se']**2, by_hand, rtol=.06)

INVALID_CALLS = [
    (lambda: cluster_bootstrap([.1, np.nan]), 'value 1 is not finite'),
    (lambda: cluster_bootstrap([]), 'n > 0'),
    (lambda: cluster_bootstrap([1., 2.], ['a', 'a']), r'too few independent groups \(1\)'),
    (lambda: cluster_bootstrap([1., 2.], [1., np.nan]), 'row 1 has no group'),
    (lambda: cluster_bootstrap([1., 2.], level=95), 'level is 95'),
    (lambda: mmd_jackknife(np.zeros((3, 2)), np.zeros((3, 3)), cubic_kernel),
     r'expected \(m, d\) and \(n, d\)'),
    (lambda: paired_permutation_test(np.zeros((3, 2)), np.zeros((4, 2)), cubic_kernel),
     'expected pairs'),
    (lambda: trend_test([[1., 2., 3.]]*2, [0, 2, 1]), 'rising epochs'),
    (lambda: paired_test([1., np.inf], [0., 0.]), 'value 1 is not finite')]

@pytest.mark.parametrize('call, message', INVALID_CALLS)
def test_invalid_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call()

# --- distances between sets

def test_estimates_equal_scikit_learn():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(40, 6)), rng.normal(.3, 1, (30, 6))
    def their_gaussian(a, b): return rbf_kernel(a, b, gamma=1/8)
    def their_cubic(a, b): return polynomial_kernel(a, b, degree=3, coef0=1)
    for kernel, theirs in ((gaussian_kernel(2.), their_gaussian), (cubic_kernel, their_cubic)):
        xx, yy, xy = theirs(x, x), theirs(y, y), theirs(x, y)
        within_x = (xx.sum()-np.trace(xx))/(40*39)
        within_y = (yy.sum()-np.trace(yy))/(30*29)
        unbiased = within_x+within_y-2*xy.mean()
        assert np.isclose(mmd_jackknife(x, y, kernel)['estimate'], unbiased, atol=1e-12)
        permuted = permutation_test(x, y, kernel, n_resamples=9)
        assert np.isclose(permuted['mmd2'], unbiased, atol=1e-12)
    distances = np.sqrt(((x[:, None]-x)**2).sum(-1))
    median = np.median(distances[np.triu_indices(40, 1)])
    estimate = mmd_jackknife(x, y, gaussian_kernel(median))['estimate']
    assert np.isclose(estimate, mmd2(x, y), atol=1e-10)

def mmd2_by_hand(x, y, groups_x, groups_y, kernel):
    "MMD² over vectors of different patients, term by term"
    def mean_between(a, b, groups_a, groups_b):
        terms = []
        for (u, i), (v, j) in itertools.product(zip(a, groups_a), zip(b, groups_b)):
            if i!=j: terms.append(kernel(u, v))
        return sum(terms)/len(terms)
    within_x = mean_between(x, x, groups_x, groups_x)
    within_y = mean_between(y, y, groups_y, groups_y)
    return within_x+within_y-2*mean_between(x, y, groups_x, groups_y)

def gaussian_by_hand(u, v): return np.exp(-((u-v)**2).sum()/2)

@pytest.mark.parametrize('shared', [True, False])
def test_jackknife_equals_leaving_out_by_hand(shared):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(9, 3)), rng.normal(.4, 1, (8, 3))
    groups_x = np.array(list('aabcccdde'))
    groups_y = np.array(list('aabbcdee')) if shared else np.array(list('ttuuvwzz'))
    o = mmd_jackknife(x, y, gaussian_kernel(1.), groups_x, groups_y, block_size=4)
    estimate = mmd2_by_hand(x, y, groups_x, groups_y, gaussian_by_hand)
    assert np.isclose(o['estimate'], estimate, atol=1e-12)
    names = sorted({*groups_x, *groups_y})
    left_out = []
    for name in names:
        in_x, in_y = groups_x!=name, groups_y!=name
        left_out.append(mmd2_by_hand(
            x[in_x], y[in_y], groups_x[in_x], groups_y[in_y], gaussian_by_hand))
    n = len(names)
    squares = (np.array(left_out)-o['estimate'])**2
    assert np.isclose(o['se'], np.sqrt((n-1)/n*squares.sum()), atol=1e-12)

def test_small_distances_are_accurate_in_float32():
    "Unit vectors, bandwidth 10, values of 1e-6: convention paper_unit_sigma10"
    rng = np.random.default_rng(7)
    x, y = (np.abs(rng.normal(1, .3, (400, 256)))+offset for offset in (0, .01))
    kernel = gaussian_kernel(10., normalize=True)
    exact = mmd_jackknife(x.astype(np.float64), y.astype(np.float64), kernel)
    single = mmd_jackknife(x.astype(np.float32), y.astype(np.float32), kernel)
    assert abs(single['estimate']-exact['estimate'])<1e-9+.01*exact['se']
    assert np.isclose(single['se'], exact['se'], rtol=.01)

@pytest.mark.long('hundreds of simulated studies, 5 s')
@pytest.mark.parametrize('paired', [False, True])
@pytest.mark.parametrize('delta', [.8, 1.5])
def test_mmd_interval_covers(delta, paired):
    rng = np.random.default_rng(8)
    d, sigma = 16, 4.
    hits = []
    for _ in range(400):
        x, patients_x = simulated_vectors(50, d, rng)
        y, patients_y = simulated_vectors(50, d, rng, delta)
        names_y = other_names(patients_y)
        if paired:                          # half of each is its partner; mean and variance stay
            y = np.sqrt(.5)*(x+y*1.)-np.r_[np.sqrt(.5)*delta-delta, np.zeros(d-1)]
            names_y = patients_x
        interval = mmd_jackknife(x, y, gaussian_kernel(sigma), patients_x, names_y)
        hits.append(covers(interval, true_mmd2(d, sigma, delta)))
    assert .925<=np.mean(hits)<=.985, np.mean(hits)

def test_mmd_interval_is_wide_if_the_sets_are_the_same():
    rng = np.random.default_rng(9)
    hits = []
    for _ in range(300):
        (x, patients_x), (y, patients_y) = (simulated_vectors(50, 16, rng) for _ in 'xy')
        interval = mmd_jackknife(
            x, y, gaussian_kernel(4.), patients_x, other_names(patients_y))
        hits.append(covers(interval, 0))
    assert np.mean(hits)>.96, np.mean(hits)

def test_estimate_and_interval_need_the_patients():
    "Almost equal images of each patient, as in a set of pairs with several pathologies"
    rng = np.random.default_rng(10)
    kernel, truth = gaussian_kernel(4.), true_mmd2(16, 4., 1.)
    with_patients, without = [], []
    for _ in range(150):
        x, patients_x = simulated_vectors(40, 16, rng, n_images=3, shared=.999)
        y, patients_y = simulated_vectors(40, 16, rng, 1., n_images=3, shared=.999)
        interval = mmd_jackknife(x, y, kernel, patients_x, other_names(patients_y))
        with_patients.append(covers(interval, truth))
        without.append(covers(mmd_jackknife(x, y, kernel), truth))
    assert np.mean(with_patients)>.92, np.mean(with_patients)
    assert np.mean(without)<.8, np.mean(without)

def test_kid_interval_covers():
    "The true value for the cubic kernel comes from one very large sample"
    rng = np.random.default_rng(11)
    d = 8
    large = [simulated_vectors(6000, d, rng, delta, n_images=1)[0] for delta in (0., 1.)]
    truth = mmd_jackknife(*large, cubic_kernel)['estimate']
    hits = []
    for _ in range(400):
        x, patients_x = simulated_vectors(60, d, rng)
        y, patients_y = simulated_vectors(60, d, rng, 1.)
        interval = mmd_jackknife(x, y, cubic_kernel, patients_x, other_names(patients_y))
        hits.append(covers(interval, truth))
    assert .92<=np.mean(hits)<=.98, np.mean(hits)

@pytest.mark.long('200 intervals, 20 s')
def test_subsampling_of_vendi_and_prdc_covers():
    "Of the functions of the library; the notebook quotes the printed coverages"
    rng = np.random.default_rng(12)
    def nonnegative_vectors(delta=0.):                                   # as features are
        vectors, patients = simulated_vectors(60, 8, rng, delta)
        return np.maximum(vectors+1, 0), patients
    def prdc_values(x, y): return np.array(list(prdc(x, y).values()))
    true_vendi = np.mean([vendi(nonnegative_vectors()[0]) for _ in range(200)])
    values = []
    for _ in range(200):
        x, y = nonnegative_vectors()[0], nonnegative_vectors(1.)[0]
        values.append(prdc_values(x, y))
    true_prdc = np.mean(values, 0)
    vendi_hits, prdc_hits = [], []
    for seed in range(200):
        x, patients_x = nonnegative_vectors()
        y, patients_y = nonnegative_vectors(1.)
        o = cluster_subsampling(vendi, x, groups_x=patients_x, n_resamples=60, seed=seed)
        vendi_hits.append(covers(o, true_vendi))
        o = cluster_subsampling(
            prdc_values, x, y, patients_x, other_names(patients_y), n_resamples=60, seed=seed)
        prdc_hits.append((o['ci_low']<=true_prdc)&(true_prdc<=o['ci_high']))
    vendi_coverage, prdc_coverage = np.mean(vendi_hits), np.mean(prdc_hits, 0)
    names = ('precision', 'recall', 'density', 'coverage')
    print('coverage: vendi', vendi_coverage, dict(zip(names, prdc_coverage)))
    assert .87<=vendi_coverage<=.995, vendi_coverage
    assert ((prdc_coverage>=.88)&(prdc_coverage<=1)).all(), prdc_coverage

# --- tests of difference

def test_permutation_p_is_uniform_and_powerful():
    rng = np.random.default_rng(13)
    null, power = [], []
    for seed in range(400):
        x, patients_x = simulated_vectors(15, 5, rng)
        for p_values, delta in ((null, 0.), (power, 1.2)):
            y, patients_y = simulated_vectors(15, 5, rng, delta)
            result = permutation_test(
                x, y, gaussian_kernel(3.), patients_x, other_names(patients_y),
                n_resamples=99, seed=seed)
            p_values.append(result['p'])
    assert is_uniform(null)
    assert (np.array(power)<=.05).mean()>.6

def test_permutation_of_images_rejects_too_often():
    rng = np.random.default_rng(14)
    p_values = []
    for seed in range(150):
        x, y = (simulated_vectors(12, 5, rng, n_images=4)[0] for _ in 'xy')
        p_values.append(permutation_test(x, y, gaussian_kernel(3.), n_resamples=99, seed=seed)['p'])
    assert (np.array(p_values)<=.05).mean()>.15

def test_paired_permutation_p_is_uniform_and_powerful():
    rng = np.random.default_rng(15)
    kernel = gaussian_kernel(3.)
    null, power = [], []
    for seed in range(400):
        shared, patients = simulated_vectors(25, 5, rng)
        x, y = (shared+.3*rng.normal(size=shared.shape) for _ in 'xy')
        moved = y+np.r_[.25, 0, 0, 0, 0]
        for p_values, other in ((null, y), (power, moved)):
            result = paired_permutation_test(x, other, kernel, patients, n_resamples=99, seed=seed)
            p_values.append(result['p'])
    assert is_uniform(null)
    assert (np.array(power)<=.05).mean()>.6

def test_permutation_equals_all_permutations_by_hand():
    rng = np.random.default_rng(16)
    x, y = rng.normal(size=(4, 2)), rng.normal(.9, 1, (3, 2))
    vectors = np.r_[x, y]
    values = []
    for in_x in itertools.combinations(range(7), 4):
        in_y = [i for i in range(7) if i not in in_x]
        in_x = list(in_x)
        values.append(mmd2_by_hand(vectors[in_x], vectors[in_y], in_x, in_y, gaussian_by_hand))
    values = np.array(values)                                            # the first is observed
    result = permutation_test(x, y, gaussian_kernel(1.), n_resamples=6000)
    assert abs(result['p']-np.mean(values>=values[0]-1e-12))<.02
    assert set(result['null'].round(9))<=set(np.round(values, 9))

# --- paired tests, trends, equivalence

def test_wilcoxon_equals_scipy():
    rng = np.random.default_rng(17)
    for n in (6, 13, 45):
        d = rng.normal(.2, 1, n)
        expected = sp.wilcoxon(d, method='exact').pvalue
        assert np.isclose(clustered_wilcoxon(d)[1], expected, rtol=1e-10)
    d = rng.normal(.05, 1, 400).round(2)                                 # ties and zeros
    correlation, p = clustered_wilcoxon(d)
    assert np.isclose(p, sp.wilcoxon(d, method='approx', correction=False).pvalue, rtol=1e-9)
    n = np.sum(d!=0)
    positive_ranks = sp.wilcoxon(d, alternative='greater').statistic
    assert np.isclose(correlation, 2*positive_ranks/(n*(n+1)/2)-1)
    tied = np.array([1, 1, -1, 2, 2, 3, -3, 4.])
    expected = sp.wilcoxon(tied, method=sp.PermutationMethod(n_resamples=np.inf)).pvalue
    assert np.isclose(clustered_wilcoxon(tied)[1], expected)

def test_wilcoxon_is_exact_for_many_pairs_of_few_patients():
    "150 pairs of five patients: two of 32 assignments of signs are as extreme"
    d = np.abs(np.random.default_rng(0).normal(1, .2, 150))
    assert np.isclose(clustered_wilcoxon(d, np.repeat(range(5), 30))[1], .0625)
    rng = np.random.default_rng(1)
    p_values = []
    for _ in range(400):
        d, patients = simulated_vectors(7, 1, rng, n_images=20, shared=.8)
        p_values.append(clustered_wilcoxon(d[:, 0], patients)[1])
    assert (np.array(p_values)<=.05).mean()<=.08

@pytest.mark.long('hundreds of simulated studies, 6 s')
@pytest.mark.parametrize('n_patients', [12, 70])
def test_wilcoxon_p_is_uniform_by_patient_and_too_small_by_pair(n_patients):
    rng = np.random.default_rng(18)
    by_patient, by_pair = [], []
    for _ in range(1500):
        d, patients = simulated_vectors(n_patients, 1, rng, n_images=3, shared=.8)
        by_patient.append(clustered_wilcoxon(d[:, 0], patients)[1])
        by_pair.append(clustered_wilcoxon(d[:, 0])[1])
    assert is_uniform(by_patient, .005)
    assert (np.array(by_pair)<=.05).mean()>.12

def test_holm_equals_its_definition_and_controls_the_family():
    rng = np.random.default_rng(19)
    for _ in range(50):
        p = rng.random(7)**2
        ordered = np.sort(p)
        expected = {}
        for i, value in enumerate(ordered):
            expected[value] = min(1, max((7-j)*ordered[j] for j in range(i+1)))
        assert np.allclose(holm_correction(p), [expected[value] for value in p])
    false_findings = []
    for _ in range(150):
        scores, patients, _ = simulated_scores(20, rng)
        equal_models = {}
        for key in itertools.product('abc', ('ssim', 'ms_ssim')):
            equal_models[key] = scores+.02*rng.normal(size=len(scores))
        table = paired_tests(equal_models, patients, n_resamples=10)
        false_findings.append((table.p_holm<.05).any())
    assert np.mean(false_findings)<.05+3*np.sqrt(.05*.95/150)

def test_interval_of_a_paired_test_is_over_patients():
    "By hand: with two patients of differences 0 and 1, a quarter of all samples gives 0, and a quarter 1"
    b = np.linspace(.1, .6, 30)
    a = b+np.repeat([0, 1], 15)
    by_patient = paired_test(a, b, 15*['a']+15*['b'])
    assert (by_patient['ci_low'], by_patient['ci_high'])==pytest.approx((0, 1))
    assert (by_patient['n'], by_patient['n_clusters'])==(30, 2)
    by_pair = paired_test(a, b)
    assert by_pair['ci_low']>.2 and by_pair['ci_high']<.8
    five_patients = np.repeat(range(5), 30)
    better = paired_test(np.arange(1., 151), np.zeros(150), five_patients, n_resamples=10)
    assert better['p']==pytest.approx(2/2**5)                            # of 32 assignments of signs

def bootstrap_by_hand(values, patients, n_resamples):
    "Means of samples of patients, drawn one by one"
    rng, names = np.random.default_rng(99), np.unique(patients)
    rows = {name: values[patients==name] for name in names}
    means = []
    for _ in range(n_resamples):
        means.append(np.concatenate([rows[name] for name in rng.choice(names, len(names))]).mean())
    return np.array(means)

def test_interval_of_a_paired_test_equals_a_bootstrap_by_hand():
    rng = np.random.default_rng(30)
    scores, patients, _ = simulated_scores(60, rng)
    other = scores-.01-.03*rng.normal(size=60)[patients]+.01*rng.normal(size=len(scores))
    result = paired_test(scores, other, patients, n_resamples=4000)
    means = bootstrap_by_hand(scores-other, patients, 4000)
    z = sp.t.ppf(.025, 59)*np.sqrt(60/59)                                # expanded percentiles
    expected = np.quantile(means, sp.norm.cdf([z, -z]))
    width = np.ptp(expected)
    assert np.allclose([result['ci_low'], result['ci_high']], expected, atol=.06*width)
    pairs_only = paired_test(scores, other, n_resamples=4000)
    assert pairs_only['ci_high']-pairs_only['ci_low']<.8*width           # what patients prevent

def score_table(scores, patients, model, copies=1):
    "Scores as the stage `metrics` gives them to `run_statistics`; copies of a pair are more pairs of its patient"
    import pandas as pd
    table = pd.DataFrame({
        'task': 'full image', 'model': model, 'source': 'samples', 'epoch': 20, 'checkpoint': 'last',
        'patient': [f'p{i}' for i in patients], 'ssim': scores, 'ms_ssim': scores**2})
    table = pd.concat([table]*copies, ignore_index=True)
    return table.assign(pair=[f'q{i}' for i in range(len(table))], image=[f'i{i}' for i in range(len(table))])

def test_more_pairs_of_the_same_patients_narrow_no_interval():
    "Copying every pair of every patient four times adds no patient: all intervals stay, to the last digit"
    import pandas as pd
    from elbowsynth.evaluation.metrics import subgroup_scores
    from elbowsynth.evaluation.run_statistics import score_intervals, score_tests, score_trends
    rng = np.random.default_rng(31)
    scores, patients, _ = simulated_scores(30, rng)
    better = scores+.01+.02*rng.normal(size=len(scores))
    epochs, limits = (10, 20, 30), ['ci_low', 'ci_high']
    found = {}
    for copies in 1, 4:
        tables = [score_table(o, patients, name, copies) for o, name in ((scores, 'one'), (better, 'two'))]
        final, n_rows = pd.concat(tables), len(scores)*copies
        rising = []
        for epoch in epochs:
            gain = .001*epoch*(1+.3*np.tile(scores, copies)/scores.std())
            rising.append(tables[0].assign(epoch=epoch, ssim=tables[0].ssim+gain))
        pairs = tables[0].assign(view='AP', pathology='normal')
        kwargs = dict(n_resamples=300)
        found[copies] = {
            'score_intervals': score_intervals(final, **kwargs)[[*limits, 'se']],
            'score_tests': score_tests(final, **kwargs)[limits],
            'score_trends': score_trends(pd.concat(rising), tables[0].assign(mmd2=.1), **kwargs)[limits][:2],
            'subgroup_scores': subgroup_scores(tables[0], pairs)[limits],
            'tost': list(tost(np.tile(better-scores, copies), .02, np.tile(patients, copies)).values())[1:4],
            'cluster_mean': cluster_mean(np.tile(scores, copies), np.tile(patients, copies))['se'],
            'paired_test': [paired_test(*(np.tile(o, copies) for o in (better, scores, patients)))[k] for k in limits],
            'trend_test': [trend_test(np.tile(np.outer(scores, [1, 2, 4]), (copies, 1)), epochs, np.tile(patients, copies))[k] for k in limits]}
    for name, once in found[1].items():
        once, often = np.asarray(once, float), np.asarray(found[4][name], float)
        assert np.isfinite(once).all() and np.allclose(once, often, rtol=1e-9), name

def test_mmd_of_a_run_leaves_out_pairs_of_one_patient():
    "`mmd_intervals` by hand, for paired and for unpaired sets"
    from elbowsynth.evaluation.mmd import MMD_CONVENTIONS
    from elbowsynth.evaluation.run_statistics import mmd_intervals
    rng = np.random.default_rng(32)
    patients = np.repeat(np.arange(12), 2)
    x = rng.normal(size=(12, 3))[patients]+.1*rng.normal(size=(24, 3))
    y = x+.3*rng.normal(size=x.shape)
    sets = [{'task': 't', 'model': str(paired), 'source': 'samples', 'epoch': 1, 'checkpoint': 'last', 'paired': paired, 'fx': x, 'fy': y,
             'noise': x+9, 'patients': patients, 'images': np.arange(24)} for paired in (True, False)]
    table = mmd_intervals(sets, {'raw': MMD_CONVENTIONS['paper_raw_gamma1d']}, n_resamples=9).set_index('model')
    def kernel(u, v): return np.exp(-((u-v)**2).sum()/3)
    names = [f'p{i}' for i in patients]
    assert table.estimate['True']==pytest.approx(mmd2_by_hand(x, y, names, names, kernel), abs=1e-9)
    made_for = [f'y{i}' for i in patients]
    assert table.estimate['False']==pytest.approx(mmd2_by_hand(x, y, names, made_for, kernel), abs=1e-9)

def test_paired_tests_use_the_pairs_that_both_models_have():
    a = np.r_[np.arange(10.), np.nan]
    scores = {('a', 'ssim'): a, ('b', 'ssim'): a[::-1], ('c', 'ssim'): a+1}
    table = paired_tests(scores, n_resamples=20)
    assert table.n.tolist()==[9, 10, 9]
    models = table[['model_a', 'model_b']].to_numpy().tolist()
    assert models==[['a', 'b'], ['a', 'c'], ['b', 'c']]
    assert np.isclose(table.difference[1], -1)
    assert table.prob_superiority[1]==0
    assert table.rank_biserial[1]==-1

@pytest.mark.long('hundreds of simulated studies, 5 s')
def test_trend_interval_covers_and_p_is_uniform():
    rng = np.random.default_rng(20)
    epochs = np.arange(0, 201, 20)
    p_values, hits = [], []
    for seed in range(800):
        scores, patients, _ = simulated_scores(50, rng)
        slopes = .0002*(1+.3*rng.normal(size=50))[patients]              # they differ by patient
        noise = .03*rng.normal(size=(len(scores), 11))
        rising = scores[:, None]+slopes[:, None]*epochs+noise
        result = trend_test(rising, epochs, patients, n_resamples=400, seed=seed)
        hits.append(covers(result, .0002))
        constant = scores[:, None]+.03*rng.normal(size=(len(scores), 11))
        p_values.append(trend_test(constant, epochs, patients, n_resamples=5)['p'])
    assert .92<=np.mean(hits)<=.98, np.mean(hits)
    assert is_uniform(p_values)

def test_trend_agrees_with_scipy():
    scores = np.random.default_rng(21).normal(size=(5, 7)).round(1)
    result = trend_test(scores, range(7), n_resamples=5)
    correlations = [sp.spearmanr(range(7), row).statistic for row in scores]
    slopes = [sp.linregress(range(7), row).slope for row in scores]
    assert np.isclose(result['rank_correlation'], np.mean(correlations))
    assert np.isclose(result['slope'], np.mean(slopes))
    constant = trend_test([[1., 1, 1]]*3, range(3), n_resamples=5)
    assert constant['rank_correlation']==0
    expected = sp.kendalltau(range(4), [5., 3, 4, 1]).pvalue
    assert np.isclose(set_trend([5., 3, 4, 1], range(4))['p'], expected)

def test_tost_equals_two_t_tests_and_keeps_its_level():
    rng = np.random.default_rng(22)
    d = rng.normal(.1, 1, 30)
    p_lower = sp.ttest_1samp(d, -.5, alternative='greater').pvalue
    p_upper = sp.ttest_1samp(d, .5, alternative='less').pvalue
    assert np.isclose(tost(d, .5)['p'], max(p_lower, p_upper))
    at_margin = []
    for _ in range(1500):
        scores, patients, _ = simulated_scores(40, rng)
        at_margin.append(tost(scores-.5+.03, .03, patients)['equivalent'])
    assert abs(np.mean(at_margin)-.05)<.025
    o = tost(d, .5)
    assert o['equivalent']==(-.5<o['ci_low'] and o['ci_high']<.5)

def test_kernel_sums_do_not_depend_on_the_block_size():
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(50, 4, dtype=torch.float64, generator=rng)
    groups, weights = torch.arange(50)//3, torch.ones(50, 2, dtype=torch.float64)
    at_once = between_group_kernel_sums(vectors, groups, weights, gaussian_kernel(1.))
    for block_size in (1, 7, 49):
        in_blocks = between_group_kernel_sums(
            vectors, groups, weights, gaussian_kernel(1.), block_size)
        assert torch.allclose(in_blocks, at_once, atol=1e-12)

# --- which convention, and what metrics respond to

def test_bounds_for_noise_hold_in_the_libraries():
    import piq
    from skimage.metrics import structural_similarity
    from elbowsynth.evaluation.conventions import max_ssim_of_noise
    from elbowsynth.phantom.phantom import phantom
    rng = np.random.default_rng(23)
    radiograph = phantom('LAT', ['normal'], size=1024).image/255
    for image in (np.full((1024, 1024), .5), radiograph):
        noise = rng.random(image.shape)
        a, b = (torch.tensor(o)[None, None] for o in (image, noise))
        assert piq.ssim(a, b)<max_ssim_of_noise(4)
        assert piq.ssim(a, b, downsample=False)<max_ssim_of_noise()
        wide_range = structural_similarity(image, noise, data_range=2)
        assert wide_range<max_ssim_of_noise(data_range=2)
        bytes_as_fractions = structural_similarity(255*image, 255*noise, data_range=1)
        assert bytes_as_fractions<max_ssim_of_noise(actual_range=255)
        assert structural_similarity(image, noise, data_range=255)>.9

def test_bounds_for_mmd_hold():
    from elbowsynth.evaluation.conventions import bandwidth_for, max_mmd
    rng = np.random.default_rng(24)
    for _ in range(50):
        x, y = (np.maximum(rng.normal(rng.normal(), 1, (20, 30)), 0)+1e-9 for _ in 'xy')
        x, y = (o/np.linalg.norm(o, axis=1, keepdims=True) for o in (x, y))
        for gamma in (1/200, 1/30, 1.):
            within_x = rbf_kernel(x, x, gamma=gamma).mean()
            within_y = rbf_kernel(y, y, gamma=gamma).mean()
            between = rbf_kernel(x, y, gamma=gamma).mean()
            assert within_x+within_y-2*between<=max_mmd(gamma, 2)
        distance_of_means = ((x.mean(0)-y.mean(0))**2).sum()
        bandwidth = bandwidth_for(mmd2(x, y, 'paper_unit_sigma10'), distance_of_means)
        assert np.isclose(bandwidth, 10, rtol=.02)                       # wide kernels: linear

def test_the_paper_is_consistent_and_leaves_five_conventions():
    from elbowsynth.paper import table1_rows
    from elbowsynth.evaluation.conventions import (
        implied_in_mask_score, implied_mask_area, implied_noise, possible_conventions)
    table = implied_noise(table1_rows())
    noise = {(o.metric, o.noise_type): o.noise for o in table.itertuples()}
    assert table.consistent.all()
    assert len(table)==6
    assert np.isclose(noise['mmd', 'noise'], 6.497e-3, rtol=1e-3)
    assert np.isclose(noise['mmd', 'mask'], 2.935e-3, rtol=1e-3)
    area = implied_mask_area(noise['ssim', 'mask'], noise['ssim', 'noise'])
    assert np.isclose((1-area)+area*implied_in_mask_score(.8, area), .8)
    with_error = [*table1_rows(), ('ssim', 'other', 'noise', .4, 2., 5e-4)]
    assert not implied_noise(with_error).consistent.all()

    claims = {(metric, 'noise'): noise[metric, 'noise'] for metric in ('ssim', 'ms_ssim', 'mmd')}
    claims['mmd', 'best'] = 1.373e-4
    found = possible_conventions(claims, 1024, 898, 2048, (.3, 1.5))
    assert found.possible.sum()==5
    assert set(found.claim[found.possible])=={'ssim of noise', 'ms_ssim of noise', 'mmd of noise'}
    small_claim = claims | {('ssim', 'noise'): .005}                     # no pooling at 256 pixels
    assert possible_conventions(small_claim, 256, 898, 2048, (.3, 1.5)).possible[:2].all()

def test_distortions_change_what_they_should():
    from elbowsynth.evaluation.sensitivity import distort, DISTORTIONS
    rng = np.random.default_rng(25)
    images = rng.integers(60, 190, (2, 40, 40), np.uint8)
    masks = np.zeros((2, 40, 40), np.uint8)
    masks[:, 10:30, 10:30] = 255
    before = images.copy()
    for name, (_, severities, _) in DISTORTIONS.items():
        errors = []
        for severity in (0, *severities):
            distorted = distort(images, masks, name, severity)
            errors.append(np.abs(distorted.astype(int)-images).mean())
        assert errors[0]==0 and min(errors[1:])>0
        assert name=='shift' or (np.diff(errors)>0).all()
        assert distorted.dtype==np.uint8
        unchanged_outside = (distorted==images)[masks==0].all()
        assert unchanged_outside==(name in ('seam', 'blur in mask'))
    assert (images==before).all()
    assert (distort(images, masks, 'shift', 3)[:, :, 3:]==images[:, :, :-3]).all()

def test_memorization_rate_is_one_for_copies_and_zero_for_distant_images():
    from elbowsynth.evaluation.sensitivity import memorization_rate
    train = np.random.default_rng(26).normal(size=(30, 5))
    assert memorization_rate(train, train)==1
    assert memorization_rate(train, train+10)==0
