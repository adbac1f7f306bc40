"""Kill a function at a file operation, run it again, and compare every file with an undisturbed run

    from kills import run_with_kills
    differing = run_with_kills(train_quickly, tmp_path, n_kills=8)
    assert differing == {k: [] for k in differing}

`train_quickly` is a function of one argument, the folder to write into. Its children are forked from this
process. Instead of the function its name may be given, `test_gans:train_quickly`: then a new process imports
that module of `tests`, runs the function once and forks the children, for functions that start threads.

A kill at operation n is a SIGKILL before the n-th call that changes a file or a folder (open to write,
replace, rename, link, unlink, mkdir, rmdir, fsync, `save_file` of safetensors), or right after a file was
emptied or half written
"""
import importlib, json, os, random, shutil, signal, subprocess, sys
from pathlib import Path

# What a log has that depends on the clock
TIMES = ('seconds', 'seconds_per_step', 'eta_seconds', 'images_per_second', 'duration')

# ---- in the child

def count_operations(kill_at, operation_log):
    "Count all file operations of this process from now on; SIGKILL at number `kill_at` (0: never)"
    import builtins, io, safetensors.torch
    count = [0]
    def point(text):
        count[0] += 1
        operation_log.write(f'{count[0]} {text}\n')
        operation_log.flush()
        if count[0] == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    def counted(function, name):
        def call(*args, **kwargs):
            point(f'{name} {" ".join(str(a) for a in args[:2])}')
            return function(*args, **kwargs)
        return call
    for name in ('replace', 'rename', 'link', 'unlink', 'remove', 'mkdir', 'rmdir', 'fsync'):
        setattr(os, name, counted(getattr(os, name), name))
    open_file, save_file = io.open, safetensors.torch.save_file
    def counted_open(file, mode='r', *args, **kwargs):
        writes = isinstance(file, (str, os.PathLike)) and any(c in mode for c in 'wax+')
        if writes: point(f'open to write {file}')
        opened = open_file(file, mode, *args, **kwargs)
        if writes: point(f'opened {file}')
        return opened
    def counted_save(tensors, filename, *args, **kwargs):
        point(f'save_file {filename}')
        save_file(tensors, filename, *args, **kwargs)
        if count[0]+1 == kill_at: os.truncate(filename, os.path.getsize(filename)//2)
        point(f'half written {filename}')
    io.open = builtins.open = counted_open
    for module in list(sys.modules.values()):
        if getattr(module, 'save_file', None) is save_file: module.save_file = counted_save

def fork_run(function, out, kill_at, operation_log):
    "Run `function(out)` in a child; its exit status, negative for a signal"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with open(operation_log, 'w') as f:
                count_operations(kill_at, f)
                function(Path(out))
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally: os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run_all(function, folder, n_kills, seed):
    "An undisturbed run, and runs that are killed and started again; {operation number: operation}"
    operation_log = folder/'operations.txt'
    assert fork_run(function, folder/'undisturbed'/'out', 0, operation_log) == 0, 'it fails without a kill'
    operations = [line.partition(' ')[2] for line in operation_log.read_text().splitlines()]
    numbers = range(1, len(operations)+1)
    moments = sorted(random.Random(seed).sample(numbers, min(n_kills, len(numbers))))
    for moment in moments:
        operation, out = operations[moment-1], folder/f'kill-{moment}'/'out'
        killed = fork_run(function, out, moment, folder/'killed.txt')
        assert killed == -signal.SIGKILL, f'it was not killed at {operation}'
        resumed = fork_run(function, out, 0, folder/'resumed.txt')
        assert resumed == 0, f'it fails when it is started again after a kill at {operation}'
    return {m: operations[m-1] for m in moments}

def main(target, folder, n_kills, seed):
    "`run_all` for the name of a function, in this process; writes `moments.json`"
    import torch
    torch.set_num_threads(1)
    module, name = target.split(':')
    function, folder = getattr(importlib.import_module(module), name), Path(folder)
    function(folder/'warm-up'/'out')                                # imports all that the children need
    shutil.rmtree(folder/'warm-up')
    (folder/'moments.json').write_text(json.dumps(run_all(function, folder, int(n_kills), int(seed))))

# ---- in the test

def comparable(path, ignored_tensors=()):
    "Contents of a file, without what depends on the clock and without some tensors"
    if path.suffix == '.jsonl':
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in r.items() if k not in TIMES} for r in records]
    if path.suffix == '.safetensors' and ignored_tensors:
        from safetensors.torch import load_file
        return {k: v.tolist() for k, v in load_file(path).items() if not k.startswith(tuple(ignored_tensors))}
    return path.read_bytes()

def cached_tensors(folder):
    "Name to bytes of all tensors of a cache, which groups them into files as they come"
    import torch
    from safetensors.torch import load_file
    found = {}
    for path in sorted(folder.glob('[!.]*.safetensors')):
        for name, tensor in load_file(path).items(): found[name] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found

def same_caches(a, b):
    "What is in both is the same; an interrupted run may have lost entries, which are computed when they are needed"
    tensors, others = cached_tensors(a), cached_tensors(b)
    shared = tensors.keys() & others.keys()
    return all(tensors[name]==others[name] for name in shared)

def differing_files(a, b, ignored_tensors=()):
    "Files below two folders that are in one only or differ; hidden files count, too"
    a, b = Path(a), Path(b)
    files = {p.relative_to(top) for top in (a, b) for p in top.rglob('*') if p.is_file()}
    caches = {name.parent for name in files if name.parent.name=='latents' and name.suffix=='.safetensors'}
    def same(name):
        both = (a/name).is_file() and (b/name).is_file()
        return both and comparable(a/name, ignored_tensors) == comparable(b/name, ignored_tensors)
    differing = [name for name in files if (name.parent not in caches or name.name[0]=='.') and not same(name)]
    differing += [name for name in caches if not same_caches(a/name, b/name)]
    return [str(name) for name in sorted(differing)]

def run_with_kills(target, folder, n_kills=8, seed=0, ignored_tensors=(), timeout=3600):
    "{operation at which the run was killed: files that differ from those of the undisturbed run}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if callable(target): moments = run_all(target, folder, n_kills, seed)
    else:
        tests = Path(__file__).parent
        env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(tests.parent), str(tests)])}
        command = [sys.executable, __file__, target, str(folder), str(n_kills), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
        assert done.returncode == 0, done.stdout[-2000:]+done.stderr[-4000:]
        moments = json.loads((folder/'moments.json').read_text())
    undisturbed = folder/'undisturbed'
    return {f'{n} {operation}': differing_files(undisturbed, folder/f'kill-{n}', ignored_tensors)
            for n, operation in moments.items()}

if __name__ == '__main__': main(*sys.argv[1:])
