"Where the figures of a bench go: `bench/results/NAME-DEVICE.md` to be read, and `.json`"
import json, os, platform, re
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]

def device():
    "What this machine computes with, in words"
    try:
        import torch
        if torch.cuda.is_available(): return torch.cuda.get_device_name()
    except ImportError: pass
    info = Path('/proc/cpuinfo')
    name = next((l.split(':')[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')), '') if info.exists() else ''
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'{name or platform.processor() or platform.machine()}, {cores} cores'

def digits(o):
    "Numbers with four digits that count"
    if isinstance(o, dict): return {k: digits(v) for k,v in o.items()}
    if isinstance(o, list): return [digits(v) for v in o]
    return float(f'{o:.4g}') if isinstance(o, float) else o

def keep(name, title, words, shown, about=None, rows=None, out=None):
    "Write both files, whole or not at all: a title, sentences, a table of `shown`; `about` and `rows` (or `shown`) for programs. Says where"
    where = device()
    text, columns = f'# {title} on {where}\n\n{words.strip()}\n\n', list(dict.fromkeys(k for r in shown for k in r))
    line = lambda cells: '| '+' | '.join(cells)+' |\n'
    text += line(columns)+line(['---']*len(columns))
    for r in digits(shown): text += line(['' if r.get(c) is None else f'{r[c]:g}' if isinstance(r[c], float) else str(r[c]) for c in columns])
    at = Path(out or TOP/'bench'/'results')/(f'{name}-'+re.sub(r'\W+', '-', where).strip('-').lower())
    at.parent.mkdir(parents=True, exist_ok=True)
    for end,content in (('.json', json.dumps(digits({'device': where, 'about': about or {}, 'rows': rows or shown}), indent=1)+'\n'), ('.md', text)):
        part = at.with_name(f'.{at.name}{end}')
        part.write_text(content)
        os.replace(part, at.with_name(at.name+end))
    print(f'{text}\nwrote {at.relative_to(TOP) if at.is_relative_to(TOP) else at}.md and .json')
