"""Time, memory and disk of each stage against the number of radiographs: `python bench/growth.py [--sizes 100 300]`.

Each size is a run of its own, `_runs/growth_SIZE`, of the profile `rehearsal` (small models, 256 pixels). The stages run one after the other, alone; what is measured stays in `growth.json` of the run, so the same command resumes, and further sizes are added to the table.
The exponent is the slope of the logarithms: 1 is linear in the number of radiographs; the start of a process (about ten seconds) makes it smaller for small sizes, so that of the two largest sizes is given, too."""
import argparse, json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from elbowsynth.core import save_json
from elbowsynth.run import plan
from results import device, write_results

SIZES = [100, 300, 1000, 2783]
COLUMNS = {'seconds': 'seconds', 'peak_mb': 'peak memory, MB', 'disk_mb': 'disk, MB', 'files': 'files'}

def settings_of(size):
    "A run has two radiographs of each patient"
    return [f'phantom.n_patients={-(-size//2)}']

def run_stage(size, stage, profile):
    "Run one stage; the peak memory of the largest of its processes, in MB"
    command = [sys.executable, '-m', 'elbowsynth.run', 'study', '--profile', profile, '--run', f'growth_{size}',
               '--set', ' '.join(settings_of(size)), '--target', stage]
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)             # the largest process below it, too
    if status: sys.exit(f'growth: {size} radiographs, stage {stage} failed; log: _runs/growth_{size}/logs/{stage}.log; '
                        'fix: mend the cause, then give the same command to resume')
    return usage.ru_maxrss/(1e6 if sys.platform=='darwin' else 1e3)

def measure_stage(size, job, profile, folder):
    "Seconds, peak memory, disk and files of a stage; a result that was not measured is made again"
    shutil.rmtree(folder/job.out, ignore_errors=True)
    peak_mb = run_stage(size, job.name, profile)
    record = json.loads((folder/'logs'/f'{job.name}.json').read_text())
    sizes = [p.stat().st_size for p in (folder/job.out).rglob('*') if p.is_file()]
    return {'seconds': record['seconds'], 'peak_mb': peak_mb, 'disk_mb': sum(sizes)/1e6, 'files': len(sizes)}

def measure_size(size, profile, stages):
    "Measure what is not measured yet; stage to values"
    name, jobs = plan(profile, run=f'growth_{size}', settings=settings_of(size))
    folder = ROOT/name
    path = folder/'growth.json'
    code = {job.name: job.code_hash for job in jobs}
    known = json.loads(path.read_text()) if path.is_file() else {}
    measured = {stage: values for stage,values in known.items() if values['code_hash']==code.get(stage)}
    for job in jobs:
        if stages and job.name not in stages: continue
        missing = [d for d in job.dependencies if d not in measured]
        if job.name in measured: continue
        if missing: sys.exit(f'growth: {size} radiographs: {job.name} reads {", ".join(missing)}, not measured; fix: add them to --stages')
        measured[job.name] = measure_stage(size, job, profile, folder) | {'code_hash': job.code_hash}
        save_json(path, measured)
        print(size, job.name, measured[job.name], flush=True)
    return {job.name: measured[job.name] for job in jobs if job.name in measured}

def exponent(sizes, values):
    "Slope of the logarithms; None with fewer than two sizes or without growth to fit"
    if len(sizes)<2 or min(values)<=0: return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])

def table_rows(measured):
    "A row for each stage and size, with the exponents of time, memory and disk in the last one"
    sizes = sorted(measured)
    rows = []
    for stage in measured[sizes[-1]]:
        at = [n for n in sizes if stage in measured[n]]
        for n in at:
            row = {'stage': stage, 'radiographs': n} | {title: measured[n][stage][k] for k,title in COLUMNS.items()}
            if n==at[-1]:
                series = {k: [measured[m][stage][k] for m in at] for k in COLUMNS}
                row |= {'exponent of time': exponent(at, series['seconds']),
                        'of time, last two sizes': exponent(at[-2:], series['seconds'][-2:]),
                        'of memory': exponent(at, series['peak_mb']), 'of disk': exponent(at, series['disk_mb'])}
            rows.append(row)
    return rows

def plot(measured, path):
    "Time, memory and disk against the number of radiographs, on logarithmic axes; a dotted line is linear"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    sizes = sorted(measured)
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.5), dpi=110)
    for ax,(key,title) in zip(axes, list(COLUMNS.items())[:3]):
        for i,stage in enumerate(measured[sizes[-1]]):
            at = [n for n in sizes if stage in measured[n]]
            style = '-' if i<10 else '--'
            ax.loglog(at, [measured[n][stage][key] for n in at], f'o{style}', color=f'C{i%10}', label=stage, ms=3)
        low = min(values[key] for values in measured[sizes[0]].values())
        ax.loglog(sizes, [max(low, 1e-3)*n/sizes[0] for n in sizes], ':', color='gray', label='linear')
        ax.set(title=title, xlabel='radiographs')
    axes[-1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1, .5))
    fig.tight_layout()
    fig.savefig(path)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--sizes', type=int, nargs='+', default=SIZES, help='numbers of radiographs')
    parser.add_argument('--stages', nargs='*', default=[], help='only these; those before them must be measured')
    parser.add_argument('--profile', default='rehearsal')
    parser.add_argument('--out', type=Path, help='folder for the tables, bench/results by default')
    args = parser.parse_args()
    if min(args.sizes)<2: parser.error(f'--sizes {min(args.sizes)}: expected 2 or more')
    measured = {size: measure_size(size, args.profile, args.stages) for size in sorted(set(args.sizes))}
    out = args.out or ROOT/'bench'/'results'
    text = (f'Profile `{args.profile}`: images of 256 pixels, small models; each stage alone, in processes of its own. Peak memory is that of the largest '
            'process. The exponent is the slope of the logarithms against the number of radiographs: 1 is linear, 0 constant. Starting a process takes '
            'about ten seconds and lowers the exponent of short stages.')
    write_results('growth', 'Growth', text, table_rows(measured), {'profile': args.profile, 'sizes': sorted(measured)}, out=out)
    slug = next(out.glob('growth-*.json')).stem
    plot(measured, out/f'{slug}.png')

if __name__=='__main__': main()
