"Write the results of a benchmark: `bench/results/NAME-DEVICE.md` to read, and `.json` for programs"
import json, os, platform, re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def device():
    "Name of the GPU of this machine, or of its processor with the number of cores"
    try:
        import torch
        if torch.cuda.is_available(): return torch.cuda.get_device_name()
    except ImportError: pass
    info, name = Path('/proc/cpuinfo'), ''
    if info.exists():
        models = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')]
        if models: name = models[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'{name or platform.processor() or platform.machine()}, {cores} cores'

def round_to_4_digits(o):
    "Numbers with four significant digits"
    if isinstance(o, dict): return {k: round_to_4_digits(v) for k,v in o.items()}
    if isinstance(o, list): return [round_to_4_digits(v) for v in o]
    return float(f'{o:.4g}') if isinstance(o, float) else o

def cell_text(value):
    "A value in a cell of a Markdown table"
    if value is None: return ''
    return f'{value:g}' if isinstance(value, float) else str(value)

def markdown_table(rows):
    "Dicts as a Markdown table; the columns are the union of the keys"
    columns = list(dict.fromkeys(k for r in rows for k in r))
    lines = [columns, ['---']*len(columns)]
    for r in round_to_4_digits(rows): lines.append([cell_text(r.get(c)) for c in columns])
    return ''.join('| '+' | '.join(line)+' |\n' for line in lines)

def result_path(name, out=None):
    "Where the results of a benchmark on this machine are, without the suffix"
    slug = re.sub(r'\W+', '-', device()).strip('-').lower()
    return Path(out or ROOT/'bench'/'results')/f'{name}-{slug}'

def write_results(name, title, text, table, settings=None, rows=None, out=None):
    "Write both files atomically: title, text and `table`; for programs `settings` and `rows` (or `table`). Prints the path"
    where = device()
    page = f'# {title} on {where}\n\n{text.strip()}\n\n{markdown_table(table)}'
    path = result_path(name, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = round_to_4_digits({'device': where, 'settings': settings or {}, 'rows': rows or table})
    for suffix,content in (('.json', json.dumps(values, indent=1)+'\n'), ('.md', page)):
        part = path.with_name(f'.{path.name}{suffix}')
        part.write_text(content)
        os.replace(part, path.with_name(path.name+suffix))
    print(f'{page}\nwrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}.md and .json')
