"""The clean filter of git for notebooks: opening and running them leaves no difference

    python workflow/clean_notebook.py nbs/2_data/31_masks.ipynb < working copy > what git compares and commits
    python workflow/clean_notebook.py       git sees again that notebooks which were only run are unchanged

`make lab` configures it for a clone. Cells whose source is unchanged keep the outputs that are committed; changed
cells bring theirs, without execution counts. If something is wrong, the file passes as it is.

Git takes a file for modified when its size has changed, without asking the filter; a pull that changes it is then
refused. So `refresh` records the new size of a file whose filtered content is what git has. JupyterLab calls it when
it saves a notebook.
"""
import json, os, subprocess, sys

def joined(value):
    "Text that JupyterLab saves as a list of lines"
    is_lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return ''.join(value) if is_lines else value

def tags(cell): return sorted(cell.get('metadata', {}).get('tags', []))

def content(cell):
    "What an author writes in a cell"
    return cell['cell_type'], joined(cell['source']), tags(cell), cell.get('attachments') or {}

def without_traces(cell, as_lines):
    "A changed cell without execution count and without metadata, except its tags"
    cell = dict(cell, metadata={'tags': cell['metadata']['tags']} if tags(cell) else {})
    if not as_lines: cell['source'] = joined(cell['source'])
    if cell['cell_type']!='code': return cell
    cell['execution_count'] = None
    is_slow = '#| slow' in joined(cell['source']).splitlines()
    outputs = [] if is_slow else [dict(output) for output in cell['outputs']]
    for output in outputs:
        if 'execution_count' in output: output['execution_count'] = None
        if as_lines: continue
        if 'text' in output: output['text'] = joined(output['text'])
        if 'data' in output: output['data'] = {kind: joined(data) for kind, data in output['data'].items()}
    return cell | {'outputs': outputs}

def clean(text, committed):
    "The notebook `text` for git; both are the bytes of a file"
    new, old = json.loads(text), json.loads(committed)
    old_contents = [content(cell) for cell in old['cells']]
    if [content(cell) for cell in new['cells']]==old_contents: return committed
    by_id = {cell['id']: cell for cell in old['cells'] if 'id' in cell}
    as_lines = any(isinstance(cell['source'], list) for cell in old['cells'])
    cells = []
    for cell in new['cells']:
        same = by_id.get(cell.get('id'))
        if same is not None and content(same)==content(cell): cells.append(same)
        else: cells.append(without_traces(cell, as_lines))
    cleaned = json.dumps(old | {'cells': cells}, sort_keys=True, indent=1, ensure_ascii=False)
    return (cleaned+'\n').encode()

def git(*args, cwd=None): return subprocess.run(['git', *args], cwd=cwd, capture_output=True)

def committed_version(path):
    "The file as git has it: in the index, else (in a conflict) in the last commit"
    for version in (f':{path}', f'HEAD:{path}'):
        done = git('cat-file', 'blob', version)
        if done.returncode==0: return done.stdout

def refresh(path, top):
    "Record size and time of a notebook in the index if its filtered content is there already; nothing is staged"
    here = git('hash-object', f'--path={path}', '--', path, cwd=top)
    committed = git('rev-parse', '--verify', '--quiet', f':./{path}', cwd=top)
    is_same = here.returncode==committed.returncode==0 and here.stdout==committed.stdout
    if is_same: git('update-index', '--', path, cwd=top)        # a git that is at work refuses; then the next save does it

def refresh_all():
    "All notebooks that git takes for modified"
    top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    modified = git('diff-files', '--name-only', '--relative', '-z', '--', '*.ipynb', cwd=top).stdout
    for path in filter(None, modified.decode(errors='surrogateescape').split('\0')): refresh(path, top)

def after_save(os_path, model, contents_manager):
    "JupyterLab has saved a file"
    if model.get('type')!='notebook': return
    try: refresh(os.path.basename(os_path), os.path.dirname(os_path))
    except OSError as error: contents_manager.log.warning(f'git was not asked about {os_path}: {error}')

def filter_file(path):
    text = sys.stdin.buffer.read()
    try:
        committed = committed_version(path)
        cleaned = text if committed is None else clean(text, committed)             # a new notebook passes
    except Exception as error:
        reason = f'{type(error).__name__}: {error}'
        print(f'{path} is no readable notebook ({reason}); git takes it as it is', file=sys.stderr)
        cleaned = text
    sys.stdout.buffer.write(cleaned)

if __name__=='__main__':
    if len(sys.argv)==2: filter_file(sys.argv[1])
    else: refresh_all()
