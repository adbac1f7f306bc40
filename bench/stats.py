"""MMD² with intervals: seconds by the clock and peak memory, by the number of films in each set; beside a plain program that keeps its kernel matrices and bootstraps them; and the two tests.

    python bench/stats.py            # to 20,000 x 2048
    python bench/stats.py 2000       # small
"""
import os, resource, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from results import keep

DIMS = 2048

def one(what, n):
    "Run in a process of its own, so that the peak memory is its own"
    import torch
    from elbowsynth.evaluation.stats import (
        gaussian_kernel, mmd_jackknife, paired_permutation_test, permutation_test)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    draw = np.random.default_rng(0)
    x, y = (np.maximum(draw.standard_normal((n, DIMS), np.float32)+o, 0) for o in (np.float32(0), np.float32(.02)))
    g = np.arange(n)//2
    kernel = gaussian_kernel(30.)
    start = time.perf_counter()
    if what=='jackknife': o = mmd_jackknife(x, y, kernel, g, [f'y{i}' for i in g])
    elif what=='paired jackknife': o = mmd_jackknife(x, y, kernel, g, g)
    elif what=='permutation': o = permutation_test(x, y, kernel, g, [f'y{i}' for i in g], n_resamples=499)
    elif what=='swap': o = paired_permutation_test(x, y, kernel, g, n_resamples=499)
    else:                                                               # three whole matrices, 200 bootstrap samples of films
        k = [kernel(*map(torch.as_tensor, p)).numpy()+1 for p in ((x, x), (y, y), (x, y))]
        def value(i, j): return (k[0][np.ix_(i, i)].sum()-n)/(n*(n-1))+(k[1][np.ix_(j, j)].sum()-n)/(n*(n-1))-2*k[2][np.ix_(i, j)].mean()
        o = {'low': np.quantile([value(draw.integers(n, size=n), draw.integers(n, size=n)) for _ in range(200)], .025)}
    print(time.perf_counter()-start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, sorted(o)[0])

def measured(what, n):
    done = subprocess.run([sys.executable, __file__, what, str(n)], capture_output=True, text=True, check=True).stdout.split()
    return {'what': what, 'films in each set': n, 'seconds': float(done[0]), 'peak GiB': float(done[1])}

if __name__=='__main__':
    if len(sys.argv)==3: one(sys.argv[1], int(sys.argv[2]))
    else:
        most = int(sys.argv[1]) if len(sys.argv)>1 else 20_000
        rows = [measured('jackknife', n) for n in sorted({898, 2000, 5000, most}) if n<=most]
        rows += [measured(w, most) for w in ('paired jackknife', 'permutation', 'swap')]
        rows += [measured('plain program, matrices kept', min(most, 2000))]
        keep('stats', 'MMD² with intervals', f'Two sets of single-precision vectors of {DIMS} numbers, two films a patient, all cores, by the clock; the tests with 499 draws; peak memory of the whole process, '
             'libraries and data included. `python bench/stats.py`.', rows)
