"""Plant bugs in a copy of the library, one at a time, and see that the named test fails

    make mutants                         all bugs of mutants.json, about ten minutes on 2 cores
    make mutants ONLY="mirror betas"     those whose fault contains one of these words

Each test must pass on the library as it is and fail with the bug. A bug that no test notices is
a gap in the tests. The exit status is the number of bugs that survived.
"""
import json, os, subprocess, sys, tempfile
from pathlib import Path
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from conftest import copy_of_checkout

def read_mutants(words=()):
    "The planted bugs whose fault contains one of the words, or all: file, old and new text, test"
    mutants = json.loads((HERE/'mutants.json').read_text(encoding='utf-8'))
    return [m for m in mutants if not words or any(word in m['fault'] for word in words)]

def run_tests(checkout, tests):
    "Exit status of pytest (0: all pass, 1: some fail, others: pytest itself failed), and its output"
    variables = os.environ | {'PYTHONPATH': str(checkout)}
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:xdist', '-p', 'no:cacheprovider']
    done = subprocess.run([*command, *tests], cwd=checkout, env=variables, capture_output=True,
                          text=True)
    return done.returncode, done.stdout[-3000:]+done.stderr[-1000:]

def replace(path, text):
    "Write a module; Python sees by its time that it has changed, and compiles it anew"
    before = path.stat().st_mtime
    path.write_text(text, encoding='utf-8')
    os.utime(path, (before+2, before+2))

def plant(checkout, mutant):
    "Put the bug into the library; its text without the bug"
    path = checkout/mutant['file']
    text = path.read_text(encoding='utf-8')
    count = text.count(mutant['old'])
    if count!=1: raise ValueError(
        f'{mutant["file"]} has {count} times {mutant["old"]!r}; expected once; fix: mutants.json')
    replace(path, text.replace(mutant['old'], mutant['new']))
    return text

def main():
    "Report each planted bug; the number of bugs that no test noticed"
    mutants = read_mutants(sys.argv[1:])
    checkout = copy_of_checkout(Path(tempfile.mkdtemp(prefix='mutants-')))
    status, output = run_tests(checkout, sorted({m['test'] for m in mutants}))
    if status: sys.exit(f'the tests do not pass without a bug\n{output}')
    survivors = 0
    for i,mutant in enumerate(mutants, 1):
        text = plant(checkout, mutant)
        status, output = run_tests(checkout, [mutant['test']])
        replace(checkout/mutant['file'], text)
        if status not in (0, 1): sys.exit(f'pytest ended with {status}: {mutant["test"]}\n{output}')
        survivors += status==0
        result = 'caught' if status else 'SURVIVED'
        print(f'{i} of {len(mutants)}: {result}: {mutant["fault"]} ({mutant["file"]})', flush=True)
    print(f'{len(mutants)-survivors} of {len(mutants)} caught')
    sys.exit(survivors)

if __name__=='__main__': main()
