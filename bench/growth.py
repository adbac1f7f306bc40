"""Growth of each stage with the number of radiographs: wall and CPU time, peak memory, disk and files.

    python bench/growth.py                    100, 300, 1000 and 2783 simulated radiographs, small models: about two hours
    python bench/growth.py --sizes 30 60      other numbers
    python bench/growth.py --stages phantom preprocess masks

The stages are those of the profile `rehearsal`, one after the other, each in its own process. What was measured is kept in
`_runs/growth_N/growth`; the same command resumes after an interruption, and measures again what other code or parameters would change.
"""
import argparse, json, math, os, shutil, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path
import numpy as np
from results import result_path, write_results
from elbowsynth.core import n_cores, root, round_floats, save_json
from elbowsynth.run import environment, plan

MEASURES = {'wall_s': 'wall time (s)', 'cpu_s': 'CPU time (s)', 'peak_mib': 'peak memory of the largest process (MiB)', 'disk_mib': 'disk (MiB)'}

def exponent(sizes, values):
    "The slope of log(value) against log(size), by least squares; None with fewer than two values above 0"
    points = [(n, v) for n,v in zip(sizes, values) if v>0]
    if len({n for n,_ in points})<2: return None
    n, v = np.log(points).T
    return float(np.polyfit(n, v, 1)[0])

def per_radiograph(sizes, values):
    "Increase of a value for one more radiograph, between the two largest sizes; None with fewer than two sizes"
    if len(sizes)<2: return None
    (n0, v0), (n1, v1) = sorted(zip(sizes, values))[-2:]
    return (v1-v0)/(n1-n0)

def disk_use(folder):
    "Path to (bytes, time of writing) of all files of a run, without its logs and what is kept here"
    found = {}
    for path in folder.rglob('*'):
        if path.is_symlink() or not path.is_file(): continue
        if path.relative_to(folder).parts[0] in ('logs', 'notebooks', 'growth'): continue
        state = path.stat()
        found[path] = state.st_size, state.st_mtime_ns
    return found

# A process begins with the peak memory of the process that started it; this small one stands between, and writes what its child took
LAUNCHER = """import json, os, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
json.dump([usage.ru_utime+usage.ru_stime, usage.ru_maxrss/1024], os.fdopen(int(sys.argv[1]), "w"))
sys.exit(code%256)"""

def run_measured(command, env):
    "Run a command; wall seconds, CPU seconds, and MiB of the largest process, with all processes that it starts"
    start = time.perf_counter()
    read_end, write_end = os.pipe()
    process = subprocess.Popen([sys.executable, '-S', '-c', LAUNCHER, str(write_end), *map(str, command)], env=env, cwd=root(), pass_fds=[write_end])
    os.close(write_end)
    with os.fdopen(read_end) as f: written = f.read()
    code = process.wait()
    if code: raise SystemExit(f'{" ".join(map(str, command))} failed with {code}; fix the cause, then rerun to resume')
    cpu_s, peak_mib = json.loads(written)
    return time.perf_counter()-start, cpu_s, peak_mib

def measure_job(job, folder, plan_path, env):
    "Run a stage from its beginning; what it took"
    shutil.rmtree(folder/job.out, ignore_errors=True)
    shutil.rmtree(folder/'latents', ignore_errors=True)             # a cache
    before = disk_use(folder)
    command = [sys.executable, '-m', 'elbowsynth.run', 'stage', job.name, plan_path]
    wall_s, cpu_s, peak_mib = run_measured(command, env)
    after = disk_use(folder)
    written = [path for path in after if after[path]!=before.get(path)]
    n_bytes = sum(after[path][0] for path in written)
    return {'wall_s': wall_s, 'cpu_s': cpu_s, 'peak_mib': peak_mib, 'disk_mib': n_bytes/2**20, 'files': len(written)}

def measure_size(n, profile, settings, stages):
    "Measure the stages with `n` radiographs, two of each patient; a list of rows"
    n_patients = math.ceil(n/2)
    settings = [f'phantom.n_patients={n_patients}', *settings]
    name, jobs = plan(profile, run=f'growth_{n}', settings=settings, targets=stages)
    folder, env = root()/name, environment(max(1, n_cores()//2))
    folder.mkdir(parents=True, exist_ok=True)
    env['ELBOWSYNTH_PARENT_PID'] = str(os.getpid())                 # a stage ends with this process
    plan_path = folder/'plan.json'
    save_json(plan_path, {'jobs': [asdict(j) for j in jobs], 'data_dir': '', 'data_hash': '', 'cores': n_cores()})
    rows, is_rerun = [], set()
    for job in jobs:
        kept = folder/'growth'/f'{job.name}.json'
        key = round_floats({'values': job.values, 'code_hash': job.code_hash})
        record = json.loads(kept.read_text()) if kept.is_file() else {}
        is_current = record.get('key')==key and (folder/job.done_file).is_file() and not is_rerun & set(job.dependencies)
        if not is_current:
            is_rerun.add(job.name)
            kept.unlink(missing_ok=True)
            record = {'key': key, 'measured': measure_job(job, folder, plan_path, env)}
            kept.parent.mkdir(exist_ok=True)
            save_json(kept, record)
        rows.append({'stage': job.name, 'radiographs': 2*n_patients, **record['measured']})
    return rows

def growth_table(rows):
    "A row for each stage: wall time and peak memory at each size, exponents, and the increase for one more radiograph"
    table = []
    for stage in dict.fromkeys(r['stage'] for r in rows):
        own = sorted((r for r in rows if r['stage']==stage), key=lambda r: r['radiographs'])
        sizes = [r['radiographs'] for r in own]
        row = {'stage': stage}
        for measure in ('wall_s', 'peak_mib', 'disk_mib'):
            unit = measure.split('_')[1].replace('mib', 'MiB')
            row |= {f'{measure.split("_")[0]} {unit} at {n}': r[measure] for n,r in zip(sizes, own)}
        row |= {f'exponent of {measure.split("_")[0]}': exponent(sizes, [r[measure] for r in own]) for measure in MEASURES}
        row['CPU ms a radiograph'] = scaled(per_radiograph(sizes, [r['cpu_s'] for r in own]), 1000)
        row['memory kB a radiograph'] = scaled(per_radiograph(sizes, [r['peak_mib'] for r in own]), 2**20/1000)
        table.append(row)
    return table

def scaled(value, factor): return None if value is None else value*factor

def plot(rows, path):
    "Each measure against the number of radiographs, both logarithmic, with a dotted line that grows linearly"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, NullLocator
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(17, 4.4), layout='constrained')
    stages = list(dict.fromkeys(r['stage'] for r in rows))
    colors = plt.get_cmap('tab20').colors
    for axis,(measure,title) in zip(axes, MEASURES.items()):
        for color,stage in zip(colors, stages):
            own = sorted((r['radiographs'], r[measure]) for r in rows if r['stage']==stage and r[measure]>0)
            if own: axis.plot(*zip(*own), marker='o', markersize=3, color=color, label=stage)
        sizes = sorted({r['radiographs'] for r in rows})
        start = min((r[measure] for r in rows if r[measure]>0 and r['radiographs']==sizes[0]), default=1)
        axis.plot(sizes, [start*n/sizes[0] for n in sizes], ':', color='gray', label='linear')
        axis.set(xscale='log', yscale='log', title=title, xlabel='radiographs')
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
        axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, .8)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    part = path.with_name(f'.{path.name}')
    figure.savefig(part, dpi=80, format='png')
    os.replace(part, path)
    plt.close(figure)

TEXT = '''Small models of the profile `{profile}`, one stage after the other, {n_threads} thread(s) of PyTorch; the stages that work on
images use all {cores} cores. Each stage is a process of its own; its wall time contains the start (imports, 4 to 15 s), so that
exponents of time between small sizes are below that of the work. The exponent is the slope of the logarithms by least squares: 1 is
linear. The last columns are the increase between the two largest sizes. Memory is that of the largest process. Disk is what a stage
has written. `python bench/growth.py {arguments}`.

![Time, memory and disk against the number of radiographs]({image})'''

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=int, nargs='+', default=[100, 300, 1000, 2783])
    parser.add_argument('--stages', nargs='*', default=[], help='stages to reach (default: those of the profile)')
    parser.add_argument('--profile', default='rehearsal')
    parser.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help='further settings')
    parser.add_argument('--out', default=None, help='folder of the results (default: bench/results)')
    args = parser.parse_args()
    if min(args.sizes)<20: parser.error(f'--sizes {min(args.sizes)}: expected 20 radiographs or more, so that the split has both parts')
    rows = []
    for n in sorted(set(args.sizes)): rows += measure_size(n, args.profile, args.set, args.stages)
    path = result_path('growth', args.out).with_suffix('.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, path)
    text = TEXT.format(profile=args.profile, n_threads=max(1, n_cores()//2), cores=n_cores(), arguments=' '.join(sys.argv[1:]), image=path.name)
    write_results('growth', 'Growth with the number of radiographs', text, growth_table(rows), {'profile': args.profile, 'set': args.set}, rows, args.out)

if __name__=='__main__': main()
