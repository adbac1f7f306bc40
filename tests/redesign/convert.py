"""convert.py IN OUT: convert a run folder or a results folder from the old names to the new ones.

IN: a run (`_runs/smoke`), `nbs/results`, one of its folders, `elbowsynth/tiny` or `bench/results`. OUT: a new folder; IN is not changed.
Renames files, CSV columns and values, and JSON keys and values by renames.json, plus the texts of the columns
`convention`, `estimator`, `reason` and `resize`. Numbers are copied as text. Other files (images, weights, logs) are copied as they are.
"""
import csv, fnmatch, json, re, shutil, sys
from pathlib import Path

CONTRACT = json.loads((Path(__file__).parent/'renames.json').read_text())
NOTEBOOKS = {p.stem.split('_', 1)[1]: f'nbs/{p.parent.name}/{p.name}' for p in (Path(__file__).resolve().parents[2]/'nbs').glob('[0-9]*/*.ipynb')}
STAGES = CONTRACT['stages']                                # teach -> finetuning_effect
TEXT_COLUMNS = ('convention', 'estimator', 'reason', 'resize')
TEXTS = [(r'mmd2_paper_A', 'mmd2_paper_unit_sigma10'), (r'\bpaper_A\b', 'paper_unit_sigma10'), (r'\bpaper_B\b', 'paper_raw_gamma1d'),
         (r'error: mean absolute difference', 'mae: mean absolute error'),
         (r'(?<!\w)mmd\.csv', 'mmd_intervals.csv'), (r'(?<!\w)intervals\.csv', 'confidence_intervals.csv'), (r'(?<!\w)choice\.csv', 'checkpoint_selection.csv'),
         (r'by `enlarged` up', 'by `upsampling` up'),
         (r'^(\d+) of the (\d+) (films|patients) that an interval wants$', lambda m: f'too few {"images" if m[3]=="films" else m[3]} for an interval ({m[1]} of {m[2]})'),
         (r'^(\d+) of the (\d+) trained checkpoints that a trend wants$', r'too few trained checkpoints for a trend (\1 of \2)'),
         (r'the same in every part of the patients', 'identical in every subsample of patients'),
         (r'parts of four fifths of the patients', 'subsamples of four fifths of the patients'),
         (r'the signs of a patient turned together', 'the signs of a patient flipped together'), (r'Holm within a block', 'Holm within a task'),
         (r'whose region holds a window', 'whose region contains a window'), (r'slope of a pair for each epoch', 'slope of a pair per epoch'),
         (r'\bfilms\b', 'images'), (r'\bfilm\b', 'image'), (r'\bcentres\b', 'centers')]
MEASURES = {'ssim': 'piq_full, mean over the windows whose center lies inside the mask', 'mae': 'mean absolute error to the injured image inside the mask, gray levels',
            'lesion_coefficient': 'least-squares coefficient, inside the mask, of the difference between the injured and the healthy image: 1 for the complete lesion, 0 for none',
            'loss_inside_mask': 'mean squared error of the prediction inside the mask, latents, with the same noise at each checkpoint',
            'resize': 'none: images are generated and scored at the size at which they were simulated'}
CONDITIONS = {'taught': 'pathology', 'batch-16': 'batch_size-16', 'numbers-bfloat16_nearest': 'number_format-bfloat16_nearest',
              'numbers-bfloat16_stochastic': 'number_format-bfloat16_stochastic', 'what_learns-LoRA': 'trained_weights-LoRA', 'loss-not_masked': 'loss-unmasked'}
FIGURES = {'film': 'example', 'normal': 'normal_examples', 'both': 'model_comparison', 'last': 'final_samples', 'choice': 'checkpoint_selection'}
BENCHMARKS = [(r'\bfilms\b', 'images'), (r'fidelity and variety', 'fidelity and diversity'), (r'^swap$', 'paired permutation'),
              (r'plain program, matrices kept', 'reference implementation, matrices in memory')]
BENCHMARK_TABLES = [(r'\btimes plain, processor time', 'speedup, CPU time'), (r'\btimes plain, fastest turns', 'speedup, fastest repeats'), (r'\btimes plain\b', 'speedup'),
                    (r'\| what \|', '| benchmark |'), (r'\| loop \|', '| variant |'), (r'models at a time', 'models in parallel'), (r'ms of processor', 'CPU ms'),
                    (r'times ours, processor', 'relative CPU time'), (r'times ours', 'relative time'), (r'largest difference from ours in its convention', 'largest absolute difference'),
                    (r'ms a pair', 'ms per pair'), (r'peak MiB of the process', 'peak MiB'), (r'films in each set', 'images per set'), (r'\| plain \|', '| reference |'), (r'\| ours \|', '| elbowsynth |'),
                    *BENCHMARKS[:2], (r'\| swap \|', '| paired permutation |'), BENCHMARKS[3], (r'Films by the clock', 'Images per wall-clock time')]

def substitute(text, rules):
    for pattern, new in rules: text = re.sub(pattern, new, text)
    return text

# ---- paths
def alternatives(pattern):
    "Braces of a pattern written out"
    m = re.search(r'\{([^{}]*)\}', pattern)
    if not m or '...' in m[1]: return [pattern]
    return [q for a in m[1].split(',') for q in alternatives(pattern[:m.start()]+a+pattern[m.end():])]

def matches(path, pattern):
    "Whether a relative path fits a pattern whose * stays within a folder"
    return any(len(path.split('/'))==len(q.split('/')) and all(map(fnmatch.fnmatchcase, path.split('/'), q.split('/'))) for q in alternatives(pattern))

def find_entry(path, root):
    "The contract's entry for a file, also where it lies deeper (demo/metrics/best.csv)"
    parts = path.split('/')
    entries = [e for e in CONTRACT['files'] if e['kind'] in ('csv', 'json', 'jsonl') and (e.get('root') or 'run') in root]
    for start in range(len(parts)):
        tail = '/'.join(parts[start:])
        for e in entries:
            if matches(tail, e['old']): return e
    return None

def new_path(path, entry):
    "Where a file goes"
    parts = path.split('/')
    if entry and '{' not in entry['new']: parts[-1] = entry['new'].split('/')[-1] if '*' not in entry['new'].split('/')[-1] else re.sub(r'\.sets\.csv$', '.set_metrics.csv', parts[-1])
    elif entry: parts[-1] = {'blown.json': 'diverged.json'}.get(parts[-1], parts[-1])
    for i, part in enumerate(parts):
        folder = parts[i-1] if i else ''
        last = i==len(parts)-1
        part = re.sub(r'-before-(\d+)$', r'-previous-\1', part)
        if part=='checkpoint-before.safetensors': part = 'checkpoint-previous.safetensors'
        if part=='grids' and not last: part = 'sample_grids'
        if part=='checks' and folder=='tensorboard': part = 'checkpoint_metrics'
        if folder=='figures' and Path(part).suffix in ('.png', '.svg'): part = FIGURES.get(Path(part).stem, Path(part).stem)+Path(part).suffix
        if folder=='finetuning_effect' and not entry: part = part.replace('lessons.', 'effects.').replace('sheet.', 'examples.')
        if folder=='ablation' and not entry: part = part.replace('answers.', 'ablation.')
        if part=='teach' or (part.startswith('teach.') and folder=='logs'): part = part.replace('teach', 'finetuning_effect', 1)
        if not last and folder in ('finetuning_effect', 'ablation'):
            m = re.fullmatch(r'(tiny-sdxl|tiny-flux)-(.*)-(\d+)', part)
            if m: part = f'{m[1]}-{CONDITIONS.get(m[2], m[2])}-{m[3]}'
        parts[i] = part
    return '/'.join(parts)

# ---- options of stages
def options_defaults():
    "Stage to its parameters and to the defaults of its options; empty if elbowsynth cannot be imported"
    if not hasattr(options_defaults, 'value'):
        options_defaults.value = {}
        try:
            from elbowsynth.diffusion.settings import CONFIGS
            from elbowsynth.stages import option_defaults, stages
            for s in stages((Path(__file__).resolve().parents[2]/'nbs')):
                options = option_defaults(s)
                if s.name in CONFIGS: options = {k: getattr(CONFIGS[s.name], k) for k in options}
                if options: options_defaults.value[s.name] = (set(s.defaults), {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()})
        except Exception as e: print(f'options of stages are not separated from parameters ({e})')
    return options_defaults.value

FROM_RECIPE = ('lr_warmup_steps', 'max_grad_norm', 'flip_probability', 'max_sequence_length', 'guidance_scale')  # 0 was the recipe's value

def separate_options(stage, values):
    "Move what is no parameter of a stage any more to `options`, without defaults, as a run records it"
    if stage not in options_defaults(): return values
    parameters, defaults = options_defaults()[stage]
    out, options = {}, {}
    for k, v in values.items():
        if k in parameters: out[k] = v
        elif k in defaults and v!=defaults[k] and not (k in FROM_RECIPE and v==0): options[k] = v
        elif k not in defaults: out[k] = v
    return out | {'options': options}

# ---- tables
def convert_csv(source, target, entry):
    with source.open(newline='', encoding='utf-8') as f: rows = list(csv.reader(f))
    if not rows: return shutil.copyfile(source, target)
    header, values = rows[0], entry.get('values', {})
    def cell(column, value):
        if column=='paper': value = value.replace('of no consequence;', 'no difference;')
        if column in values and value in values[column]: return values[column][value]
        if column in ('arm', 'trial'): return CONDITIONS.get(value, value)
        return substitute(value, TEXTS) if column in TEXT_COLUMNS and entry['old'].split('/')[0] in ('metrics', 'figures') else value
    renamed = [entry['columns'].get(c, c) for c in header]
    with target.open('w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(renamed)
        for row in rows[1:]: writer.writerow([cell(c, v) for c, v in zip(header, row)])

# ---- JSON
def split_key(pattern): return tuple(re.split(r'(?<!\d)\.|\.(?!\d)', pattern))

def fits(path, pattern): return len(path)==len(pattern) and all(q=='*' or q==p for p, q in zip(path, pattern))

def rename_key(path, entry, stage):
    "The new name of the key at a path of old keys"
    for old, new in entry['columns'].items():
        if not fits(path, split_key(old)): continue
        if new=='each key by stage_params': return CONTRACT['stage_params'].get(stage, {}).get(path[-1], path[-1])
        return split_key(new)[-1].removesuffix('[]')
    return path[-1]

def convert_value(path, value, entry, stage):
    "The new value at a path of old keys"
    for old, mapping in entry.get('values', {}).items():
        if fits(tuple(p.removesuffix('[]') for p in path), tuple(p.removesuffix('[]') for p in split_key(old))):
            if isinstance(value, list): return [mapping.get(v, v) if isinstance(v, str) else v for v in value]
            if isinstance(value, str): return mapping.get(value, value)
    mapping = CONTRACT['stage_param_values'].get(f'{stage}.{path[-1]}') if path and 'values' in ''.join(path[:-1]) else None
    return mapping.get(value, value) if mapping and isinstance(value, str) else value

def convert_tree(tree, entry, path=(), stage=None):
    "A JSON tree with new keys and values"
    if isinstance(tree, dict):
        if isinstance(tree.get('name'), str): stage = tree['name']
        out = {}
        for key, value in tree.items():
            here = path+(key,)
            inner = key if path==('values',) and key in CONTRACT['stage_params'] else stage
            out[rename_key(here, entry, inner)] = convert_tree(convert_value(here, value, entry, inner), entry, here, inner)
        return out
    if isinstance(tree, list): return [convert_tree(v, entry, path[:-1]+(path[-1]+'[]',) if path and not path[-1].endswith('[]') else path, stage) for v in tree]
    return tree

def rename_everywhere(tree, keys, texts=()):
    "Rename keys, and strings under `param_name`, at any depth"
    if isinstance(tree, dict): return {keys.get(k, k): keys.get(v, v) if k=='param_name' else rename_everywhere(v, keys, texts) for k, v in tree.items()}
    if isinstance(tree, list): return [rename_everywhere(v, keys, texts) for v in tree]
    return substitute(tree, texts) if isinstance(tree, str) and texts else tree

def finish(tree, name):
    "What the contract says in notes, for one file"
    if name in ('stage.json', 'plan.json', 'run.json'):
        def stage_names(o):
            if isinstance(o, dict):
                o = {STAGES.get(k, k): stage_names(v) for k, v in o.items()}
                if isinstance(o.get('notebook'), str): o['notebook'] = NOTEBOOKS.get(STAGES.get(o.get('name'), o.get('name')), o['notebook'])
                return o
            if isinstance(o, list): return [stage_names(v) for v in o]
            return STAGES.get(o, '_runs/finetuning_effect' if o=='_runs/teach' else o) if isinstance(o, str) else o
        tree = stage_names(tree)
        for job in tree.get('jobs', [tree] if name=='stage.json' else []): job['values'] = separate_options(job['name'], job['values'])
        if name=='run.json': tree['values'] = {k: separate_options(k, v) for k, v in tree['values'].items()}
        return tree
    if name=='metrics/metrics.json': return rename_everywhere(tree, {'unit': 'unit_norm', 'mmd2_paper_A': 'mmd2_paper_unit_sigma10', 'error': 'mae'}, TEXTS)
    if name.endswith('conventions.json'): return {k: MEASURES.get(k, v) for k, v in tree.items()}
    if name=='search/journal.jsonl': return rename_everywhere(tree, {'batch': 'batch_size', 'lr_c': 'lr_classifier'})
    if name=='*.json':                                     # bench
        for row in tree.get('rows', []):
            if 'benchmark' in row: row['benchmark'] = substitute(row['benchmark'], BENCHMARKS)
        return rename_everywhere(tree, {'batch': 'batch_size'})
    if name=='manifest.json': return rename_everywhere(tree, {'weights': 'n_parameters'})
    return tree

def dump(tree, like):
    "JSON text laid out like the old text: its indent, order of keys and separators"
    indent = re.match(r'[\[{]\n( *)', like)
    keys = re.findall(rf'^{indent[1]}"([^"]+)":', like, re.M) if indent else []
    compact = not indent and re.match(r'\{"[^"]*":\S', like)
    text = json.dumps(tree, indent=len(indent[1]) if indent else None, ensure_ascii='\\u' in like, sort_keys=bool(keys) and keys==sorted(keys),
                      separators=(',', ':') if compact else None)
    return text+('\n' if like.endswith('\n') else '')

def convert_json(source, target, entry):
    name = entry['old'] if '/' not in entry['old'] or not entry['old'].startswith('*') else entry['old'].split('/')[-1]
    text = source.read_text(encoding='utf-8')
    convert = lambda o: finish(convert_tree(o, entry), name)
    if entry['kind']=='jsonl': new = ''.join(dump(convert(json.loads(l)), l.strip())+'\n' for l in text.splitlines() if l.strip())
    else: new = dump(convert(json.loads(text)), text)
    target.write_text(new, encoding='utf-8')

def root_of(folder):
    "Which part of the contract a folder belongs to"
    if list(folder.glob('tiny-*')): return ('elbowsynth/tiny',)
    if folder.name=='results' and folder.parent.name=='bench': return ('bench/results',)
    return ('run', 'nbs/results/demo')

def main(source, out):
    root, unknown = root_of(source), []
    for path in sorted(p for p in source.rglob('*') if p.is_file()):
        rel = path.relative_to(source).as_posix()
        if rel.startswith(('.snakemake', '.lock')): continue
        whole = f'{source.name}/{rel}' if source.name in ('teach', 'ablation', 'metrics', 'figures') else rel
        entry = None if re.search(r'(^|/)model/(?!trained)', rel) or rel.startswith('tiny-') else find_entry(whole, root)
        new = new_path(whole, entry)
        target = out/(new.split('/', 1)[1] if whole!=rel else new)
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry and entry['kind']=='csv': convert_csv(path, target, entry)
        elif entry: convert_json(path, target, entry)
        elif root==('bench/results',) and path.suffix=='.md': target.write_text(substitute(path.read_text(encoding='utf-8'), BENCHMARK_TABLES), encoding='utf-8')
        else:
            shutil.copyfile(path, target)
            if path.suffix in ('.csv', '.json', '.jsonl') and '/model/' not in rel and not rel.startswith('tiny-'): unknown.append(rel)
    for rel in unknown: print('copied as it is:', rel)

if __name__=='__main__':
    if len(sys.argv)!=3: raise SystemExit(__doc__)
    source, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    if out.exists() and any(out.iterdir()): raise SystemExit(f'{out} exists; expected a new folder')
    main(source, out)
