"What a user installs"
import ast, importlib, re, sys
import pytest
from conftest import ROOT, copy_of_checkout, sh

LIBRARY = ROOT/'elbowsynth'
SUBPACKAGES = sorted(p.parent.name for p in LIBRARY.glob('*/__init__.py'))

def module_names():
    "Dotted names of all modules, found by their files"
    paths = [p.relative_to(ROOT).with_suffix('') for p in LIBRARY.rglob('*.py')]
    return sorted('.'.join(p.parts).removesuffix('.__init__') for p in paths if p.name!='_modidx' and 'tiny' not in p.parts)

def bundled_files(folder):
    "Files of the bundled base models, relative to the package"
    return sorted(str(p.relative_to(folder)) for p in (folder/'tiny').rglob('*') if p.is_file())

@pytest.mark.long('builds and installs a wheel, 20 s')
def test_wheel_has_all_modules_and_bundled_models(tmp_path):
    top = copy_of_checkout(tmp_path/'clone')
    sh('uv', 'build', '-q', '--wheel', '--no-build-isolation', '--python', sys.executable, '-o', tmp_path, top)
    wheel, = tmp_path.glob('elbowsynth-*.whl')
    sh('uv', 'pip', 'install', '-q', '--python', sys.executable, '--no-deps', '--target', tmp_path/'site', wheel)
    names = module_names()
    assert {'elbowsynth.core', 'elbowsynth.data.masks', 'elbowsynth.diffusion'}<=set(names)
    code = f'''
import importlib
modules = [importlib.import_module(name) for name in {names!r}]
assert all({str(tmp_path)!r} in m.__file__ for m in modules)
print(len(modules))'''
    done = sh(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
    assert int(done.stdout)==len(names)
    installed = tmp_path/'site'/'elbowsynth'
    assert bundled_files(installed)==bundled_files(LIBRARY) and len(bundled_files(installed))>20

# The public names that subpackages hand on

def public_names(subpackage): return importlib.import_module(f'elbowsynth.{subpackage}').PUBLIC

def test_subpackages_are_seen(): assert {'data', 'phantom', 'gans', 'diffusion', 'evaluation', 'report', 'experiments'}==set(SUBPACKAGES)

@pytest.mark.parametrize('subpackage', SUBPACKAGES)
def test_public_names_resolve(subpackage):
    package = importlib.import_module(f'elbowsynth.{subpackage}')
    assert len(package.PUBLIC)>=4 and package.__all__==sorted(package.PUBLIC) and set(package.PUBLIC)<=set(dir(package))
    for name, module in package.PUBLIC.items():
        source = importlib.import_module(f'elbowsynth.{subpackage}.{module}')
        assert getattr(package, name) is getattr(source, name), name
        assert getattr(package, name) is getattr(source, name), name        # also after the module was imported

def test_public_names_are_unique():
    names = [name for s in SUBPACKAGES for name in public_names(s)]
    assert len(names)==len(set(names))

def test_public_names_of_the_readme_exist():
    assert {'train_flux', 'sample_flux', 'load_flux', 'train_sdxl', 'add_pathology'}<=set(public_names('diffusion'))
    assert {'ssim', 'ms_ssim', 'mmd2'}<=set(public_names('evaluation')) and 'train_wgan_gp' in public_names('gans')
    assert {'read_labels', 'read_image', 'import_folder'}<=set(public_names('data')) and 'phantom' in public_names('phantom')

def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'elbowsynth.data' has no attribute 'read_film'"): importlib.import_module('elbowsynth.data').read_film

@pytest.mark.parametrize('statement', ['import elbowsynth.data', 'from elbowsynth.data import read_image, read_labels', 'import elbowsynth.diffusion',
                                       'from elbowsynth.diffusion import FineTuneConfig', 'import elbowsynth.gans', 'import elbowsynth.evaluation',
                                       'from elbowsynth.phantom import phantom', 'import elbowsynth.run'])
def test_import_loads_no_torch(statement):
    done = sh(sys.executable, '-c', f'import sys\n{statement}\nprint(sorted({{"torch", "diffusers"}} & set(sys.modules)))')
    assert done.stdout.strip()=='[]'

def test_the_runner_starts_without_heavy_packages():
    "Each stage starts it once: numpy, nbformat (through jsonschema) and snakemake take seconds"
    code = 'import sys, elbowsynth.run\nprint(sorted({"numpy", "pandas", "matplotlib", "nbformat", "jsonschema", "papermill", "snakemake"} & set(sys.modules)))'
    assert sh(sys.executable, '-c', code).stdout.strip()=='[]'
    code = 'import sys\nfrom elbowsynth.job import _leave_out_iri_grammar\n_leave_out_iri_grammar()\nimport papermill, lark\nprint("rfc3987_syntax.syntax_helpers" in sys.modules)'
    assert sh(sys.executable, '-c', code).stdout.strip()=='False'

def test_a_name_of_a_module_means_the_function():
    code = ('import elbowsynth.evaluation.ssim, elbowsynth.phantom.anatomy, elbowsynth.phantom.phantom\n'
            'from elbowsynth.evaluation import ssim\nfrom elbowsynth.phantom import phantom\nprint(ssim.__name__, callable(ssim), callable(phantom))')
    assert sh(sys.executable, '-c', code).stdout.split()==['ssim', 'True', 'True']

# Commands

def test_make_lists_its_commands(tmp_path):
    top = copy_of_checkout(tmp_path/'clone')
    listed = sh('make', cwd=top).stdout
    for command in ('study', 'test', 'fuzz', 'lab', 'site', 'clean', 'help', 'inpaint', 'import'): assert f'make {command} ' in listed, listed
    planned = sh('make', '-n', '-o', 'install', 'study', 'PROFILE=smoke', 'DATA=my images', 'SET=epochs=3 lr=1e-4', cwd=top, PROFILE='work', RUN='x').stdout
    assert '--profile "smoke" --data "my images" --run "" --set \'epochs=3 lr=1e-4\'' in planned      # variables of the shell do not count
    planned = sh('make', '-n', '-o', 'install', 'import', 'DATA=x', 'FROM=mura', 'TO=y', 'OPTIONS=--license CC0', cwd=top).stdout
    assert 'elbowsynth.data.import_cli mura "x" "y" --license CC0' in planned
    planned = sh('make', '-n', '-o', 'install', 'lab', 'RUN=mine', 'DATA=my images', cwd=top, PROFILE='work').stdout
    assert 'jupyter lab nbs/index.ipynb' in planned
    assert 'ELBOWSYNTH_PROFILE="demo" ELBOWSYNTH_RUN="mine" ELBOWSYNTH_DATA="my images"' in planned
    planned = sh('make', '-n', '-o', 'install', 'prepare', cwd=top).stdout
    assert 'elbowsynth.run defaults' in planned

def test_readme_example_is_accepted():
    from elbowsynth.run import plan, split_settings
    text = re.search(r'`SET="([^"]+)"`', (ROOT/'README.md').read_text())[1]
    jobs = {j.name: j.values for j in plan('demo', settings=split_settings(text))[1]}
    for setting in split_settings(text):
        target, value = setting.split('=', 1)
        stage, _, name = target.rpartition('.')
        changed = [values for job, values in jobs.items() if stage in ('', job) and (name in values or name in values.get('options', {}))]
        assert changed, setting
        assert all(str(v.get(name, v.get('options', {}).get(name)))==str(ast.literal_eval(value)) for v in changed), setting
