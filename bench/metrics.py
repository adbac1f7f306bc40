"""Compare the scores with piq and torchmetrics, and time MMD of large sets and a whole checkpoint: `python bench/metrics.py [--quick]`. Writes `bench/results/metrics-DEVICE.md` and `.json`.

SSIM at full resolution plus MS-SSIM of images of 1024 x 1024, as wall-clock time with as many threads as there are cores. The three libraries alternate in one run, so that other load on the machine affects all alike, and
their values are compared. A checkpoint is scored as the stage does it: reading, SSIM, MS-SSIM, three regions, features, sets, tables; the time of a pair comes from a run of a few pairs and one of more."""
import argparse, os, resource, statistics, tempfile, time
from pathlib import Path
import cv2, numpy as np, pandas as pd, piq, torch
import torchmetrics.functional.image as tm
from results import write_results
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
    "Value of a function, seconds of wall-clock time and of CPU time"
    start, cpu_start = time.perf_counter(), time.process_time()
    value = f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return value, time.perf_counter()-start, time.process_time()-cpu_start

def random_images(n, size, rng):
    "Smooth images with noise, floats in [0, 1]"
    smooth = [cv2.GaussianBlur(rng.random((size, size), np.float32), (0, 0), size/60)
              for _ in range(n)]
    images = np.stack(smooth)
    images = (images-images.min((1, 2), keepdims=True))/np.ptp(images, (1, 2), keepdims=True)
    return np.clip(images+rng.normal(0, .03, images.shape), 0, 1).astype(np.float32)

def similarity(n, size, repeats, device):
    "Milliseconds of a pair by each library, and the maximum difference of their values"
    rng = np.random.default_rng(0)
    x,y = random_images(n, size, rng), random_images(n, size, rng)
    tx,ty = (torch.tensor(o, device=device)[:, None] for o in (x, y))

    def by_elbowsynth():
        full = ssim(x, y, convention='piq_full', device=device)
        return full, ms_ssim(x, y, device=device)
    def by_piq():
        full = piq.ssim(tx, ty, downsample=False, reduction='none')
        return full.cpu().numpy(), piq.multi_scale_ssim(tx, ty, reduction='none').cpu().numpy()
    def by_torchmetrics():
        kwargs = dict(data_range=1., reduction='none')
        full = tm.structural_similarity_index_measure(tx, ty, **kwargs)
        multi = tm.multiscale_structural_similarity_index_measure(tx, ty, **kwargs)
        return full.cpu().numpy(), multi.cpu().numpy()

    libraries = {'elbowsynth': by_elbowsynth, 'piq': by_piq, 'torchmetrics': by_torchmetrics}
    ms = {name: [] for name in libraries}
    cpu_ms = {name: [] for name in libraries}
    values = {}
    for repeat in range(repeats+1):
        for name,f in libraries.items():
            values[name], seconds, cpu = timed(f)
            if not repeat: continue                                 # the first one warms up
            ms[name].append(1e3*seconds/n)
            cpu_ms[name].append(1e3*cpu/n)

    own = statistics.median(ms['elbowsynth']), statistics.median(cpu_ms['elbowsynth'])
    rows = []
    for name in libraries:
        row = {
            'benchmark': f'SSIM (full resolution) and MS-SSIM of a pair of {size} x {size}: {name}',
            'ms': statistics.median(ms[name]), 'cpu_ms': statistics.median(cpu_ms[name])}
        row |= {'relative_time': row['ms']/own[0], 'relative_cpu_time': row['cpu_ms']/own[1]}
        if name!='elbowsynth':
            full, multi = values[name]
            ssim_convention = 'piq_full' if name=='piq' else name
            ms_ssim_kwargs = {} if name=='piq' else {'convention': name}
            difference = max(np.abs(ssim(x, y, convention=ssim_convention)-full).max(),
                             np.abs(ms_ssim(x, y, **ms_ssim_kwargs)-multi).max())
            row['max_abs_difference'] = float(difference)
        rows.append(row)
    return rows

def peak_mib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def large_sets(n, d):
    "MMD with its interval of two sets of n vectors, two images of each patient, and the memory of the process"
    rng = np.random.default_rng(0)
    def random_features(mean):
        blocks = [np.maximum(rng.normal(mean, .5, (500, d)), 0).astype(np.float32)
                  for _ in range(n//500)]
        return np.concatenate(blocks)
    fx,fy = random_features(.5), random_features(.51)
    patients = np.arange(n)//2
    before = peak_mib()
    def interval():
        kernel = make_kernel(MMD_CONVENTIONS['median'], fx, fy)
        return mmd_jackknife(fx, fy, kernel, patients, patients+n)
    _, seconds, cpu = timed(interval)
    return [{
        'benchmark': f'MMD² (median) with its interval of {n} x {d} against as many',
        'ms': 1e3*seconds, 'cpu_ms': 1e3*cpu, 'peak_mib': peak_mib(), 'mib_before': before}]

def set_statistics(n, d):
    "Intervals and tests of one checkpoint's features: their time grows with the square of the number of pairs"
    rng, patients = np.random.default_rng(0), np.arange(n)//2
    real, fake, noise = (
        np.maximum(rng.normal(m, .5, (n, d)), 0).astype(np.float32) for m in (.5, .51, .7))
    features = {
        'task': 'inpainting', 'model': 'flux', 'source': 'samples', 'epoch': 0,
        'checkpoint': 'last', 'paired': True, 'fx': real, 'fy': fake, 'noise': noise,
        'patients': patients, 'images': np.arange(n)}
    benchmarks = {
        'MMD² by five conventions with intervals and tests':
            lambda: mmd_intervals([features], MMD_CONVENTIONS),
        'fidelity and diversity with intervals':
            lambda: diversity_intervals([features], fidelity_diversity)}
    rows = []
    for benchmark,f in benchmarks.items():
        _, seconds, cpu = timed(f)
        rows.append({'benchmark': f'{benchmark}, one set of {n} x {d}', 'ms': 1e3*seconds,
                     'cpu_ms': 1e3*cpu, 'minutes': seconds/60})
    return rows

def write_run(folder, n, size, rng):
    "A run with one checkpoint of an inpainting model for n test pairs"
    mask = np.zeros((size, size), np.uint8)
    mask[size//4:3*size//4, size//3:4*size//5] = 255
    rows = []
    for i in range(n):
        name = f'f{i}__normal'
        rows.append({'pair': name, 'image': f'f{i}', 'patient': f'p{i}', 'view': 'AP',
                     'pathology': 'normal', 'split': 'test'})
        real, fake = (255*random_images(2, size, rng)).astype(np.uint8)
        write_png(folder/'images'/f'f{i}.png', real)
        write_png(folder/'masks'/f'{name}.png', mask)
        write_png(folder/'flux'/'samples'/'0000'/f'{name}.png', np.where(mask>0, fake, real))
        write_png(folder/'flux'/'raw'/'0000'/f'{name}.png', fake)
    (folder/'split').mkdir()
    pd.DataFrame(rows).to_csv(folder/'split'/'pairs.csv', index=False)

def checkpoint(few, many, size, extractor, pairs=898):
    "Time of a checkpoint of `pairs` pairs, from two runs of fewer"
    rng = np.random.default_rng(0)
    def time_checkpoint(folder, n):
        write_run(folder, n, size, rng)
        def score():
            return score_run(
                folder, ['flux'], size=size, extractor=extractor, statistics=run_statistics)
        score()                              # baselines, real features, raw and samples: cached
        for p in (folder/'metrics'/'epochs').glob('flux_samples*'): p.unlink()
        return timed(score)[1:]              # the samples again
    load_extractor(extractor)
    with tempfile.TemporaryDirectory() as tmp:
        few_seconds, few_cpu = time_checkpoint(Path(tmp)/str(few), few)
        many_seconds, many_cpu = time_checkpoint(Path(tmp)/str(many), many)
    per_pair = (many_seconds-few_seconds)/(many-few)
    cpu_per_pair = (many_cpu-few_cpu)/(many-few)
    seconds = few_seconds+per_pair*(pairs-few)
    return [{
        'benchmark': f'a checkpoint of {pairs} pairs of {size} x {size} with three regions, '
                     f'{extractor.partition(":")[0]}: projected from {few} and {many} pairs',
        'ms': 1e3*seconds, 'cpu_ms': 1e3*(few_cpu+cpu_per_pair*(pairs-few)),
        'ms_per_pair': 1e3*per_pair, 'minutes': seconds/60}]

def random_resnet(folder):
    "A ResNet-50 with random weights: as slow as the trained one, and no download"
    from safetensors.torch import save_file
    from torchvision.models import resnet50
    torch.manual_seed(0)
    weights = {k: v.contiguous() for k,v in resnet50().state_dict().items()}
    save_file(weights, Path(folder)/'random.safetensors')
    return f'resnet50:{folder}/random.safetensors'

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='small, to test that it runs; writes nothing unless --out is given')
    parser.add_argument('--out', type=Path, help='folder for the tables, bench/results by default')
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = similarity(2, 256, 1, device) if args.quick else similarity(8, 1024, 5, device)
    sizes = (2, 4, 176) if args.quick else (16, 64, 1024)
    with tempfile.TemporaryDirectory() as folder:
        for extractor in ('efficientnet_lite0', random_resnet(folder)):
            rows += checkpoint(*sizes, extractor)
    rows += set_statistics(40, 64) if args.quick else set_statistics(898, 2048)
    rows += large_sets(500, 64) if args.quick else large_sets(20_000, 2048)
    if args.quick and not args.out:
        print(*rows, sep='\n')
        return
    words = (f'Wall-clock time with {CORES} threads, medians of repeats; ResNet-50 with random weights, '
             'which is as slow as with trained ones. `python bench/metrics.py`.')
    write_results('metrics', 'Metrics', words, rows, out=args.out)

if __name__=='__main__': main()
