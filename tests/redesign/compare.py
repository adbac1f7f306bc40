"""Compare a run of the version before the redesign with the same run of this version: every number must be equal.

    git worktree add /tmp/before da89161                # the version before the redesign
    (cd /tmp/before && make study PROFILE=smoke)        # its run
    make study PROFILE=smoke                            # this version's run
    .venv/bin/python tests/redesign/compare.py /tmp/before/_runs/smoke _runs/smoke

The old run is copied to a temporary folder with its files, columns, keys and values renamed (`convert.py`, by `renames.json`), and the two
folders are compared: tables and JSON value by value, images pixel by pixel, weights tensor by tensor. Texts that describe (conventions,
estimators, reasons), times, figures and the settings of a training (which hold more fields now) are left out; files left out are counted.
"""
import argparse, json, subprocess, sys, tempfile
from collections import Counter
from pathlib import Path
import cv2
import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

HERE = Path(__file__).parent
TEXT_COLUMNS = {'convention', 'estimator', 'extractor', 'resize', 'reason', 'conclusion', 'paper_finding'}     # of tables, and keys of JSON files
TEXT_KEYS = {'notebook', 'code_hash', 'versions', 'python', 'seconds', 'time', 'data_hash', 'elapsed', 'images_per_second', 'seconds_per_step',
             'eta_seconds', 'input_hash', 'boundary', '_name_or_path', *TEXT_COLUMNS, 'resize', 'ssim', 'ssim_full', 'ms_ssim', 'mmd2', 'images_hash', 'test_hash', 'validation_hash'}
SKIPPED = ('plan.json', 'sdxl/config.json', 'flux/config.json', 'figures/', 'logs/', 'notebooks/', 'tensorboard/', 'report.html', '.snakemake/', 'stage.json', 'search/journal.jsonl', '.npy')
TENSORS = {'dis/score.': 'dis/adv_head.', 'dis/kind.': 'dis/class_head.', 'random/': 'rng/', 'rng/own': 'rng/run'}

def same_number(a, b, rtol):
    if np.isnan(a) and np.isnan(b): return True
    return a == b if rtol == 0 else bool(np.isclose(a, b, rtol=rtol, atol=0))

def same_value(a, b, rtol):
    try: return same_number(float(a), float(b), rtol)
    except (TypeError, ValueError): return str(a) == str(b)

def compare_table(old, new, rtol):
    "Differences of two CSV files, as texts"
    a = pd.read_csv(old, dtype=str, keep_default_na=False)
    b = pd.read_csv(new, dtype=str, keep_default_na=False)
    faults = []
    if set(a.columns) != set(b.columns): faults.append(f'columns {sorted(set(a.columns)-set(b.columns))} became {sorted(set(b.columns)-set(a.columns))}')
    if len(a) != len(b): return faults+[f'{len(a)} rows became {len(b)}']
    for column in a.columns.intersection(b.columns).difference(list(TEXT_COLUMNS)):
        rows = [i for i, (x, y) in enumerate(zip(a[column], b[column])) if not same_value(x or 'nan', y or 'nan', rtol)]
        if rows: faults.append(f'{column}: {len(rows)} of {len(a)} rows differ, as {a[column][rows[0]]!r} and {b[column][rows[0]]!r} in row {rows[0]}')
    return faults

def compare_json(a, b, rtol, path=''):
    "Differences of two values read from JSON, as texts"
    if isinstance(a, dict) and isinstance(b, dict):
        faults = [f'{path}: keys {sorted(set(a)-set(b))} became {sorted(set(b)-set(a))}'] if set(a) != set(b) else []
        shared = [k for k in a if k in b and not (k in TEXT_KEYS and not isinstance(a[k], float))]
        return faults+[f for k in shared for f in compare_json(a[k], b[k], rtol, f'{path}/{k}')]
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b): return [f'{path}: {len(a)} entries became {len(b)}']
        return [f for i, (x, y) in enumerate(zip(a, b)) for f in compare_json(x, y, rtol, f'{path}/{i}')]
    return [] if same_value(a, b, rtol) else [f'{path}: {a!r} became {b!r}']

def compare_lines(old, new, rtol):
    a, b = ([json.loads(line) for line in p.read_text().splitlines()] for p in (old, new))
    timed = ('images_per_second', 'seconds_per_step', 'eta_seconds', 'time')
    for row in a+b:
        for key in timed: row.pop(key, None)
    return compare_json(a, b, rtol)[:5]

def tensor_name(name):
    for old, new in TENSORS.items(): name = name.replace(old, new)
    return name

def compare_tensors(old, new, rtol):
    "Differences of two weight files or checkpoints, as texts"
    with safe_open(old, 'pt') as a, safe_open(new, 'pt') as b:
        names = {tensor_name(k): k for k in a.keys()}
        faults = []
        if set(names) != set(b.keys()):
            faults.append(f'tensors {sorted(set(names)-set(b.keys()))[:3]} became {sorted(set(b.keys())-set(names))[:3]}')
        for name, was in names.items():
            if name not in b.keys(): continue
            x, y = a.get_tensor(was), b.get_tensor(name)
            equal = torch.equal(x, y) if rtol == 0 else x.shape == y.shape and torch.allclose(x, y, rtol=rtol)
            if not equal: faults.append(f'{name} differs')
    return faults

def compare_image(old, new, rtol):
    a, b = (cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (old, new))
    return [] if a.shape == b.shape and np.array_equal(a, b) else ['pixels differ']

def compare_json_files(old, new, rtol): return compare_json(json.loads(old.read_text()), json.loads(new.read_text()), rtol)[:5]

COMPARE = {'.csv': compare_table, '.json': compare_json_files, '.jsonl': compare_lines, '.png': compare_image}

def compare_file(old, new, rtol):
    if old.suffix == '.safetensors': return compare_tensors(old, new, rtol)
    return COMPARE[old.suffix](old, new, rtol)

def compare_runs(old, new, rtol=0):
    "Differences by file, and how many files of each kind were equal"
    faults, counts = {}, Counter()
    files = [p for p in sorted(old.rglob('*')) if p.is_file()]
    for p in files:
        name = p.relative_to(old).as_posix()
        if any(s in name for s in SKIPPED) or p.suffix not in (*COMPARE, '.safetensors'): counts['left out'] += 1; continue
        if not (new/name).is_file(): faults[name] = ['missing in this version']; continue
        found = compare_file(p, new/name, rtol)
        if found: faults[name] = found
        else: counts[p.suffix] += 1
    known = {p.relative_to(old).as_posix() for p in files}
    more = [p.relative_to(new).as_posix() for p in new.rglob('*') if p.is_file()]
    extra = [n for n in more if n not in known and not any(s in n for s in SKIPPED) and Path(n).suffix in COMPARE]
    faults.update({n: ['only in this version'] for n in sorted(extra)})
    return faults, counts

def main():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument('old', type=Path, help='run folder of the version before the redesign')
    top.add_argument('new', type=Path, help='run folder of this version')
    top.add_argument('--rtol', type=float, default=0, help='relative tolerance; 0 for equality')
    a = top.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder)/'run'
        subprocess.run([sys.executable, HERE/'convert.py', a.old, converted], check=True)
        faults, counts = compare_runs(converted, a.new, a.rtol)
    for name, texts in faults.items(): print(f'{name}: {"; ".join(texts)}')
    print(f'{sum(counts.values())-counts["left out"]} files equal ({dict(counts)}), {len(faults)} differ')
    sys.exit(bool(faults))

if __name__ == '__main__': main()
