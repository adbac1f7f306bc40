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

def test_make_lists_its_commands(tmp_path):
    top = copy_of_checkout(tmp_path/'clone')
    said = sh('make', cwd=top).stdout
    assert all(f'make {w} ' in said for w in ('study', 'test', 'lab', 'site', 'clean', 'help', 'inpaint')), said
    plan = sh('make', '-n', '-o', 'install', 'study', 'PROFILE=smoke', 'DATA=my films', 'SET=epochs=3 lr=1e-4', cwd=top, PROFILE='work', RUN='x').stdout
    assert '--profile "smoke" --data "my films" --run "" --set \'epochs=3 lr=1e-4\'' in plan                # what is set in the shell does not count

def test_readme_example_is_accepted():
    from elbowsynth.run import plan, split_settings
    import re
    text = re.search(r'`SET="([^"]+)"`', (ROOT/'README.md').read_text())[1]
    jobs = {j.name: j.values for j in plan('demo', settings=split_settings(text))[1]}
    assert jobs['wgan_gp']['lr']==1e-4 and jobs['sdxl']['epochs']==10
