"""Scores beside piq and torchmetrics, MMD of large sets, and a whole checkpoint, on this machine: `python bench/metrics.py [--quick]`. Writes `bench/results/metrics-DEVICE.md` and `.json`.

SSIM at full resolution plus MS-SSIM of films of 1024 x 1024, by the clock with as many threads as there are cores; the three take turns in one run, so that a busy machine disturbs all alike, and the values
they give are compared. A checkpoint is scored as the stage does it: reading, SSIM, MS-SSIM, three regions, features, sets, tables; a run of a few pairs and one of more tell the time of a pair."""
import argparse, os, resource, statistics, tempfile, time
from pathlib import Path
import cv2, numpy as np, pandas as pd, piq, torch
import torchmetrics.functional.image as tm
from results import keep
from elbowsynth.data.images import write_png
from elbowsynth.evaluation.extractors import load_extractor
from elbowsynth.evaluation.mmd import fidelity_diversity, make_kernel, MMD_CONVENTIONS
from elbowsynth.evaluation.ssim import ms_ssim, ssim
from elbowsynth.evaluation.metrics import score_run
from elbowsynth.evaluation.stats import mmd_jackknife
from elbowsynth.evaluation.run_statistics import diversity_intervals, mmd_intervals, run_statistics

CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
torch.set_num_threads(CORES)

def timed(f):
    start, busy = time.perf_counter(), time.process_time()
    value = f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return value, time.perf_counter()-start, time.process_time()-busy

def elbows(n, size, rng):
    "Smooth films with grain, floats in [0, 1]"
    films = np.stack([cv2.GaussianBlur(rng.random((size, size), np.float32), (0, 0), size/60) for _ in range(n)])
    films = (films-films.min((1, 2), keepdims=True))/np.ptp(films, (1, 2), keepdims=True)
    return np.clip(films+rng.normal(0, .03, films.shape), 0, 1).astype(np.float32)

def similarity(n, size, turns, device):
    "Milliseconds of a pair of each library, and how far their values are apart"
    rng = np.random.default_rng(0)
    x,y = elbows(n, size, rng), elbows(n, size, rng)
    tx,ty = (torch.tensor(o, device=device)[:, None] for o in (x, y))
    ways = {'elbowsynth': lambda: (ssim(x, y, convention='piq_full', device=device), ms_ssim(x, y, device=device)),
            'piq': lambda: (piq.ssim(tx, ty, downsample=False, reduction='none').cpu().numpy(), piq.multi_scale_ssim(tx, ty, reduction='none').cpu().numpy()),
            'torchmetrics': lambda: (tm.structural_similarity_index_measure(tx, ty, data_range=1., reduction='none').cpu().numpy(),
                                     tm.multiscale_structural_similarity_index_measure(tx, ty, data_range=1., reduction='none').cpu().numpy())}
    clock, busy, value = {w: [] for w in ways}, {w: [] for w in ways}, {}
    for turn in range(turns+1):
        for w,f in ways.items():
            value[w], seconds, cpu = timed(f)
            if turn: clock[w].append(1e3*seconds/n); busy[w].append(1e3*cpu/n)
    theirs = {'piq': {}, 'torchmetrics': {'convention': 'torchmetrics'}}
    rows = []
    for w in ways:
        off = None
        if w!='elbowsynth': off = max(np.abs(ssim(x, y, convention='piq_full' if w=='piq' else w)-value[w][0]).max(), np.abs(ms_ssim(x, y, **theirs[w])-value[w][1]).max())
        rows.append({'what': f'SSIM (full resolution) and MS-SSIM of a pair of {size} x {size}: {w}', 'ms': statistics.median(clock[w]), 'ms of processor': statistics.median(busy[w]),
                     'times ours': statistics.median(clock[w])/statistics.median(clock['elbowsynth']),
                     'times ours, processor': statistics.median(busy[w])/statistics.median(busy['elbowsynth'])} | ({} if off is None else {'largest difference from ours in its convention': float(off)}))
    return rows

def large_sets(n, d):
    "MMD of two sets of n vectors, two films a patient, with its interval, and the memory of the process"
    rng = np.random.default_rng(0)
    fx,fy = (np.concatenate([np.maximum(rng.normal(.5+.01*i, .5, (500, d)), 0).astype(np.float32) for _ in range(n//500)]) for i in (0, 1))
    g = np.arange(n)//2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, seconds, cpu = timed(lambda: mmd_jackknife(fx, fy, make_kernel(MMD_CONVENTIONS['median'], fx, fy), g, g+n))
    return [{'what': f'MMD² (median) with its interval of {n} x {d} against as many', 'ms': 1e3*seconds, 'ms of processor': 1e3*cpu,
             'peak MiB of the process': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, 'MiB before': before/1024}]

def statistics_of_a_set(n, d):
    "Intervals and tests of one checkpoint's features, which a projection by pairs would miss: they grow with the square of the pairs"
    rng, g = np.random.default_rng(0), np.arange(n)//2
    real, fake, noise = (np.maximum(rng.normal(m, .5, (n, d)), 0).astype(np.float32) for m in (.5, .51, .7))
    one = {'block': 'inpainting', 'model': 'flux', 'kind': 'samples', 'epoch': 0, 'checkpoint': 'last', 'paired': True, 'fx': real, 'fy': fake, 'noise': noise, 'patients': g, 'films': np.arange(n)}
    rows = []
    for what,f in (('MMD² by five conventions with intervals and tests', lambda: mmd_intervals([one], MMD_CONVENTIONS)), ('fidelity and variety with intervals', lambda: diversity_intervals([one], fidelity_diversity))):
        _, seconds, cpu = timed(f)
        rows.append({'what': f'{what}, one set of {n} x {d}', 'ms': 1e3*seconds, 'ms of processor': 1e3*cpu, 'minutes': seconds/60})
    return rows

def checkpoint(few, many, size, extractor, pairs=898):
    "Seconds of a checkpoint of `pairs` pairs, from two runs of fewer"
    with tempfile.TemporaryDirectory() as tmp:
        rng = np.random.default_rng(0)
        def run(n):
            at = Path(tmp)/str(n)
            white = np.zeros((size, size), np.uint8)
            white[size//4:3*size//4, size//3:4*size//5] = 255
            rows = [{'pair': f'f{i}__normal', 'image': f'f{i}', 'patient': f'p{i}', 'view': 'AP', 'pathology': 'normal', 'split': 'test'} for i in range(n)]
            for r in rows:
                real, fake = (255*elbows(2, size, rng)).astype(np.uint8)
                write_png(at/'images'/f'{r["image"]}.png', real)
                write_png(at/'masks'/f'{r["pair"]}.png', white)
                for kind in 'samples', 'raw': write_png(at/'flux'/kind/'0000'/f'{r["pair"]}.png', np.where(white>0, fake, real) if kind=='samples' else fake)
            (at/'split').mkdir()
            pd.DataFrame(rows).to_csv(at/'split'/'pairs.csv', index=False)
            score_run(at, ['flux'], size=size, extractor=extractor, statistics=run_statistics)               # floors, real features, raw and samples: kept
            for p in (at/'metrics'/'epochs').glob('flux_samples*'): p.unlink()     # then the samples again
            return timed(lambda: score_run(at, ['flux'], size=size, extractor=extractor, statistics=run_statistics))[1:]
        load_extractor(extractor)
        (a, ca), (b, cb) = run(few), run(many)
        each, cpu = (b-a)/(many-few), (cb-ca)/(many-few)
    return [{'what': f'a checkpoint of {pairs} pairs of {size} x {size} with three regions, {extractor.partition(":")[0]}: projected from {few} and {many} pairs', 'ms': 1e3*(a+each*(pairs-few)),
             'ms of processor': 1e3*(ca+cpu*(pairs-few)), 'ms a pair': 1e3*each, 'minutes': (a+each*(pairs-few))/60}]

def random_resnet(folder):
    "A ResNet-50 with weights drawn by chance: as slow as the trained one, and there without network"
    from safetensors.torch import save_file
    from torchvision.models import resnet50
    torch.manual_seed(0)
    save_file({k: v.contiguous() for k,v in resnet50().state_dict().items()}, Path(folder)/'chance.safetensors')
    return f'resnet50:{folder}/chance.safetensors'

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('--quick', action='store_true', help='small, to see that it runs; writes nothing unless --out is given')
    a.add_argument('--out', type=Path, help='folder for the tables, bench/results by default')
    o = a.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = similarity(2, 256, 1, device) if o.quick else similarity(8, 1024, 5, device)
    with tempfile.TemporaryDirectory() as folder:
        for e in ['efficientnet_lite0', random_resnet(folder)]: rows += checkpoint(*((2, 4, 176) if o.quick else (16, 64, 1024)), e)
    rows += statistics_of_a_set(*((40, 64) if o.quick else (898, 2048)))
    rows += large_sets(*((500, 64) if o.quick else (20_000, 2048)))
    if o.quick and not o.out: print(*rows, sep='\n')
    else: keep('metrics', 'Metrics', f'Films by the clock with {CORES} threads, medians of turns; ResNet-50 with weights drawn by chance, which are as slow as trained ones. `python bench/metrics.py`.', rows, out=o.out)
