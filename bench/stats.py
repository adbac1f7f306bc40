"""Benchmark of MMD² with intervals and of its tests: wall-clock time and peak memory by the number of images in each set, next to a reference implementation that keeps its kernel matrices in memory and bootstraps them.

    python bench/stats.py            # up to 20,000 x 2048
    python bench/stats.py 2000       # small
"""
import os, resource, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from results import write_results

FEATURE_DIM = 2048
REFERENCE = 'reference implementation, matrices in memory'
HEADINGS = {'images_per_set': 'images per set', 'peak_gib': 'peak GiB'}

def reference_bootstrap(x, y, kernel, rng, n_resamples=200):
    "Lower percentile of MMD² over bootstrap samples of images, from three kernel matrices"
    import torch
    n = len(x)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    xx, yy, xy = (kernel(*pair).numpy()+1 for pair in ((x, x), (y, y), (x, y)))
    values = []
    for _ in range(n_resamples):
        i, j = rng.integers(n, size=n), rng.integers(n, size=n)
        within_x = (xx[np.ix_(i, i)].sum()-n)/(n*(n-1))
        within_y = (yy[np.ix_(j, j)].sum()-n)/(n*(n-1))
        values.append(within_x+within_y-2*xy[np.ix_(i, j)].mean())
    return {'ci_low': np.quantile(values, .025)}

def run_benchmark(name, n):
    "Run one benchmark in this process and print seconds and peak memory in GiB"
    import torch
    from elbowsynth.evaluation.mmd import gaussian_kernel
    from elbowsynth.evaluation.stats import (
        mmd_jackknife, paired_permutation_test, permutation_test)
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    torch.set_num_threads(n_cores)
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((n, FEATURE_DIM), np.float32), 0)
    y = np.maximum(rng.standard_normal((n, FEATURE_DIM), np.float32)+np.float32(.02), 0)
    patients = np.arange(n)//2
    patients_y = [f'y{i}' for i in patients]
    kernel = gaussian_kernel(30.)
    start = time.perf_counter()
    if name=='jackknife': mmd_jackknife(x, y, kernel, patients, patients_y)
    elif name=='paired jackknife': mmd_jackknife(x, y, kernel, patients, patients)
    elif name=='permutation':
        permutation_test(x, y, kernel, patients, patients_y, n_resamples=499)
    elif name=='paired permutation':
        paired_permutation_test(x, y, kernel, patients, n_resamples=499)
    elif name==REFERENCE: reference_bootstrap(x, y, kernel, rng)
    else: raise ValueError(f'unknown benchmark {name!r}')
    seconds = time.perf_counter()-start
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(seconds, peak_kib/2**20)

def measure(name, n):
    "Run one benchmark in a process of its own, so that the peak memory is its own"
    command = [sys.executable, __file__, name, str(n)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {'benchmark': name, 'images_per_set': n,
            'seconds': float(printed[0]), 'peak_gib': float(printed[1])}

def main(max_images):
    "All benchmarks; writes the results"
    sizes = [n for n in sorted({898, 2000, 5000, max_images}) if n<=max_images]
    rows = [measure('jackknife', n) for n in sizes]
    for name in 'paired jackknife', 'permutation', 'paired permutation':
        rows.append(measure(name, max_images))
    rows.append(measure(REFERENCE, min(max_images, 2000)))
    text = (f'Two sets of float32 vectors of length {FEATURE_DIM}, two images per patient, all cores, '
            'wall-clock time; the tests with 499 resamples; peak memory of the whole process, '
            'libraries and data included. `python bench/stats.py`.')
    table = [{HEADINGS.get(k, k): v for k,v in row.items()} for row in rows]
    write_results('stats', 'MMD² with intervals', text, table, rows=rows)

if __name__=='__main__':
    if len(sys.argv)==3: run_benchmark(sys.argv[1], int(sys.argv[2]))
    else: main(int(sys.argv[1]) if len(sys.argv)>1 else 20_000)
