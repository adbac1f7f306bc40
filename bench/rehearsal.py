"""Where the time of a rehearsal went: jobs, computing, waiting, disk and files of each stage.

    make study PROFILE=rehearsal CLUSTER=slurm SITE=FILE RUN=rehearsal      about half an hour on two cores
    python bench/rehearsal.py rehearsal                                     then writes the table

It reads the records of the jobs (`logs/JOB.json`) of a finished run, on the machine that made it.
"""
import argparse, json, re
from pathlib import Path
from results import write_results
from elbowsynth.core import root

def read_records(folder):
    "The records of all jobs, in the order of their starts; SystemExit if one is not done"
    contents = [json.loads(p.read_text()) for p in sorted((folder/'logs').glob('*.json'))]
    records = [r for r in contents if 'state' in r]                 # not those of progress bars
    unfinished = [r['job'] for r in records if r['state']!='done']
    if not records: raise SystemExit(f'{folder}: no records of jobs; fix: run the study first')
    if unfinished: raise SystemExit(f'{folder}: not done: {", ".join(unfinished)}; fix: run the study to its end')
    return sorted(records, key=lambda r: (r['started'], r['ended']))

def disk_use(folder):
    "MiB and number of the files of a folder"
    sizes = [p.stat().st_size for p in folder.rglob('*') if p.is_file() and not p.is_symlink()]
    return sum(sizes)/2**20, len(sizes)

def stage_rows(records, outs, folder):
    "A row for each stage: jobs, computing, from the first start to the last end, disk and files"
    begin, rows = min(r['started'] for r in records), []
    for stage in dict.fromkeys(r['stage'] for r in records):
        own = [r for r in records if r['stage']==stage]
        mib, n_files = disk_use(folder/outs.get(stage, stage))
        rows.append({
            'stage': stage, 'jobs': len(own), 'computing (min)': sum(r['seconds'] for r in own)/60,
            'longest job (min)': max(r['seconds'] for r in own)/60,
            'begins at (min)': (min(r['started'] for r in own)-begin)/60,
            'ends at (min)': (max(r['ended'] for r in own)-begin)/60, 'disk (MiB)': mib, 'files': n_files})
    return rows

def total_row(records, rows, folder):
    "The sums, and how long the run took"
    wall_s = max(r['ended'] for r in records)-min(r['started'] for r in records)
    mib, n_files = disk_use(folder)
    return {'stage': 'all', 'jobs': len(records), 'computing (min)': sum(r['computing (min)'] for r in rows),
            'longest job (min)': max(r['longest job (min)'] for r in rows), 'begins at (min)': 0.,
            'ends at (min)': wall_s/60, 'disk (MiB)': mib, 'files': n_files}

TEXT = '''{n} simulated radiographs of {size} pixels, small models, two or three checkpoints of each, all jobs through Slurm on one machine,
{n_jobs} at a time, one core each, {beside}. The run took {wall:.0f} minutes. Computing is the sum over the jobs of a stage and contains the start
of each process (imports, 5 to 15 s); a job that waits for others computes nothing. Disk and files of `all` include logs, executed notebooks and
caches. `make study PROFILE=rehearsal CLUSTER=slurm SITE=FILE`, then `python bench/rehearsal.py RUN`.'''

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='name of a run below _runs')
    parser.add_argument('--beside', default='on a quiet machine', help='what else the machine did')
    parser.add_argument('--jobs', type=int, default=2, help='max_jobs of the file of the site')
    parser.add_argument('--out', default=None, help='folder of the results (default: bench/results)')
    args = parser.parse_args()
    if not re.fullmatch(r'[\w. -]+', args.run): parser.error(f'{args.run!r} is no name of a run')
    folder = root()/'_runs'/args.run
    records = read_records(folder)
    jobs = json.loads((folder/'plan.json').read_text())['jobs']
    rows = stage_rows(records, {j['stage']: j['out'] for j in jobs}, folder)
    total = total_row(records, rows, folder)
    values = {j['stage']: j['values'] for j in jobs}
    text = TEXT.format(n=2*values['phantom']['n_patients'], size=values['phantom']['size'], n_jobs=args.jobs, beside=args.beside, wall=total['ends at (min)'])
    write_results('rehearsal', "A rehearsal of the paper's study", text, [*rows, total], {'run': args.run}, out=args.out)

if __name__=='__main__': main()
