"What a user installs"
import sys
from conftest import ROOT, copy_of_checkout, sh

def test_a_wheel_imports(tmp_path):
    top = copy_of_checkout(tmp_path/'clone')
    sh('uv', 'build', '-q', '--wheel', '--no-build-isolation', '--python', sys.executable, '-o', tmp_path, top)
    wheel, = tmp_path.glob('elbowsynth-*.whl')
    sh('uv', 'pip', 'install', '-q', '--python', sys.executable, '--no-deps', '--target', tmp_path/'site', wheel)
    names = sorted(p.stem for p in (ROOT/'elbowsynth').glob('*.py') if not p.stem.startswith('_'))
    code = f'import importlib, elbowsynth; mods = [importlib.import_module("elbowsynth."+n) for n in {names!r}]; assert all({str(tmp_path)!r} in m.__file__ for m in mods); print(len(mods))'
    assert int(sh(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(tmp_path/'site')).stdout)==len(names)
