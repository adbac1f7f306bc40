"The inpainting models: Table 7, recipes, resuming after a kill, what is trained and saved, and use from outside"
import inspect, json, os, signal, subprocess, sys, time
from dataclasses import asdict, fields, replace
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file
from conftest import ROOT
from elbowsynth.data.images import read_image
from elbowsynth.diffusion import flux, sdxl
from elbowsynth.diffusion.finetune import learning_rates, Schedule, train_cli
from elbowsynth.diffusion.flux import load_flux, sample_flux, train_flux
from elbowsynth.diffusion.latents import InpaintDataset, toy_data, write_onetrainer_folder
from elbowsynth.diffusion.sampling import composite
from elbowsynth.diffusion.sdxl import load_sdxl, sample_sdxl, tiny_sdxl, train_sdxl
from elbowsynth.diffusion.settings import (
    build_parser, CONFIGS, DTYPE_FIELDS, FineTuneConfig, FLUX, make_config, RECIPES, resolve_config,
    SDXL, unused_table7_rows)

TOY = toy_data(6, 32)
PAIRS = InpaintDataset(*(field[:2] for field in TOY))
QUICK = dict(checkpoint_every=1, boost_epochs=0, epochs=1, num_inference_steps=1,
             gradient_checkpointing=False, device='cpu', lr=1e-3, n_validation=1)
QUICK_SDXL = dict(QUICK, base_model='tiny-sdxl-random')
QUICK_FLUX = dict(QUICK, base_model='tiny-flux-random')

def checkpoint(out): return load_file(out/'checkpoint.safetensors')

def same_result(a, b):
    "Whether two trainings ended with the same weights, optimizer states and images"
    def images(out):
        paths = [p for k in ('samples', 'raw') for p in sorted((out/k).rglob('*.png'))]
        return {p.relative_to(out): p.read_bytes() for p in paths}
    def tensors(out): return {k: v for k, v in checkpoint(out).items() if not k.startswith('rng/')}
    one, two = tensors(a), tensors(b)
    if one.keys() != two.keys(): return False
    return all(torch.equal(one[k], two[k]) for k in one) and images(a) == images(b)

# ---- Table 7

PAPER_VALUES = dict(
    epochs=200, lr=1e-5, boost_lr=1e-4, boost_epochs=20, checkpoint_every=20, batch_size=4,
    optimizer='adafactor', scale_parameter=False, relative_step=False, warmup_init=False,
    fused_back_pass=False, decay_rate=-.8, text_encoder_lr=3e-6, text_encoder_epochs=200, ema_decay=0.,
    train_denoiser=True, denoiser_epochs=200, unmasked_probability=.1, unmasked_weight=.4,
    normalize_masked_area_loss=False, loss_weight_fn='constant', snr_gamma=5., loss_scaler='none',
    lr_scheduler='constant', vae_dtype='float32', recipe='corrected', text_encoder='trained',
    text_encoder_2='trained', lora_rank=0)

@pytest.mark.parametrize('config,dtype,rounding', [(SDXL, 'float32', False), (FLUX, 'bfloat16', True)])
def test_table_7_is_the_default(config, dtype, rounding):
    values = asdict(config)
    assert {k: values[k] for k in PAPER_VALUES} == PAPER_VALUES
    assert config.stochastic_rounding == rounding
    resolved = asdict(resolve_config(config))
    assert {resolved[k] for k in ('weight_dtype', *DTYPE_FIELDS)} == {dtype}
    assert unused_table7_rows(config) == ['snr_gamma', 'warmup_init']
    expected = {'snr_gamma', 'warmup_init', 'unmasked_weight'} | ({'stochastic_rounding'} if rounding else set())
    assert set(unused_table7_rows(make_config(config, recipe='onetrainer-2025'))) == expected

@pytest.mark.parametrize('model', ['sdxl', 'flux'])
def test_signature_and_command_line_show_all_options(model):
    train, config = {'sdxl': (train_sdxl, SDXL), 'flux': (train_flux, FLUX)}[model]
    parameters = inspect.signature(train).parameters
    options = {k: v for k, v in asdict(config).items() if k != 'model'}
    assert {k: parameters[k].default for k in options} == options
    assert set(parameters)-set(options) == {'train', 'test', 'out', 'config'}
    text = build_parser(config).format_help()
    assert all(f'--{k} ' in text for k in options)

@pytest.mark.parametrize('model,stage', [('sdxl', '49_sdxl'), ('flux', '50_flux')])
def test_stage_has_the_defaults_of_its_trainer(model, stage):
    from elbowsynth.stages import read_parameters
    cell = read_parameters(ROOT/'nbs'/'4_diffusion'/f'{stage}.ipynb')
    options = asdict(CONFIGS[model])
    shared = cell.keys() & options.keys()-{'max_minutes'}
    assert {k: cell[k] for k in shared} == {k: options[k] for k in shared}
    assert set(cell)-set(options) == {'run', 'split', 'masks', 'images', 'out', 'size', 'options'}
    assert cell['size'] == 1024 and cell['options'] == {}
    assert {'lr', 'epochs', 'batch_size', 'recipe', 'base_model', 'seed', 'device'} <= shared

def test_flux_trains_and_samples_with_the_same_guidance():
    values = []
    for recipe in RECIPES:
        config = resolve_config(make_config(FLUX, recipe=recipe))
        values.append((config.guidance_scale, config.max_sequence_length))
    assert values == [(30, 512), (1, 77)]
    assert resolve_config(SDXL).guidance_scale == 7.5

def test_options_given_with_a_recipe_override_it():
    config = make_config(FLUX, recipe='onetrainer-2025', guidance_scale=30., flip_probability=0.)
    assert (config.guidance_scale, config.flip_probability, config.lr_warmup_steps) == (30, 0, 200)
    assert make_config(replace(SDXL, flip_probability=.3), recipe='corrected').flip_probability == .3

USELESS = [
    dict(snr_gamma=1.), dict(stochastic_rounding=True), dict(warmup_init=True), dict(train_dtype='float64'),
    dict(text_encoder='frozen', text_encoder_2='frozen', text_encoder_lr=1e-4),
    dict(train_denoiser=False, denoiser_epochs=3), dict(optimizer='adamw', decay_rate=-.5),
    dict(recipe='onetrainer-2025', unmasked_weight=1.), dict(fsdp=True), dict(relative_step=True, lr=1e-3),
    dict(recipe='onetrainer-2025', stochastic_rounding=True, weight_dtype='bfloat16'),
    dict(optimizer='adamw', stochastic_rounding=True, weight_dtype='bfloat16'),
    dict(normalize_masked_area_loss=True, unmasked_weight=1.), dict(lora_rank=4, output_dtype='bfloat16'),
    dict(relative_step=True, boost_lr=1e-3), dict(max_sequence_length=512), dict(timestep_offset=.001)]

@pytest.mark.parametrize('options', USELESS, ids=lambda o: '-'.join(o))
def test_an_option_without_effect_is_an_error(options):
    with pytest.raises(ValueError, match='has no effect'): resolve_config(make_config(SDXL, **options))

@pytest.mark.parametrize('options', [
    dict(snr_gamma=1., loss_weight_fn='min-snr'), dict(stochastic_rounding=True, weight_dtype='bfloat16'),
    dict(warmup_init=True, relative_step=True),
    dict(recipe='onetrainer-2025', unmasked_weight=.5, normalize_masked_area_loss=True)], ids=lambda o: '-'.join(o))
def test_the_same_option_may_have_an_effect(options): resolve_config(make_config(SDXL, **options))

def test_all_errors_of_a_configuration_are_reported_together():
    config = make_config(SDXL, optimizer='sgd', snr_gamma=1., vae_dtype='int8', batch_size=3, epochs=300)
    messages = ('optimizer: expected one of', 'snr_gamma=1.0 has no effect', 'vae_dtype: expected one of',
                'batch_size 3 is not divisible by 2', 'no component is trained after epoch 200 of 300')
    with pytest.raises(ValueError) as error: resolve_config(config, world_size=2)
    assert all(m in str(error.value) for m in messages)

def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"unknown option 'base' \(did you mean base_model\?\); unknown option 'zzz'"):
        train_sdxl(TOY, PAIRS, tmp_path/'out', base='tiny-sdxl', zzz=1)
    with pytest.raises(ValueError, match='got a configuration of flux'): train_sdxl(TOY, PAIRS, tmp_path/'out', FLUX)
    assert not (tmp_path/'out').exists()

def test_settings_do_not_import_torch():
    code = 'import sys, elbowsynth.diffusion.settings; print("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.stdout.strip() == 'False'
    assert all(f.type in (str, int, float, bool, 'str', 'int', 'float', 'bool') for f in fields(FineTuneConfig))

def test_warmup_and_boost_of_the_learning_rate():
    config = make_config(SDXL, recipe='onetrainer-2025')
    rates = [learning_rates(step, Schedule(500, 600, {}), config)[0] for step in (1, 101, 201, 501)]
    assert np.allclose(rates, [0, .5e-5, 1e-5, 1e-4])

# ---- resuming after a kill

SCRIPT = '''
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_diffusion as t
model, out = sys.argv[1:3]
{'sdxl': t.train_sdxl, 'flux': t.train_flux}[model](t.TOY, t.PAIRS, Path(out), **t.LONG[model])
'''
LONG = {'sdxl': dict(QUICK_SDXL, epochs=3, boost_epochs=1, checkpoint_every=2, flip_probability=.5, max_translation_px=8),
        'flux': dict(QUICK_FLUX, epochs=3, boost_epochs=1, checkpoint_every=2)}

def kill_while_training(model, out):
    "Start a training in another process; kill -9 after two steps"
    command = [sys.executable, '-c', SCRIPT, model, str(out), str(ROOT/'tests')]
    process = subprocess.Popen(command, env=os.environ | {'PYTHONPATH': str(ROOT)})
    log, deadline = out/'log.jsonl', time.time()+200
    def has_steps(): return log.exists() and len(log.read_text().splitlines()) >= 2
    while process.poll() is None and time.time() < deadline and not has_steps(): time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out/'boosted.safetensors').exists()

def interrupt_while_sampling(model, out, monkeypatch):
    "The first image of an epoch is generated, then the training stops"
    module, train = {'sdxl': (sdxl, train_sdxl), 'flux': (flux, train_flux)}[model]
    name = f'sample_{model}'
    sample = getattr(module, name)
    def sample_one(pipe, images, masks, captions, seed_keys, *args, **kwargs):
        sample(pipe, images[:1], masks[:1], captions[:1], seed_keys[:1], *args, **kwargs)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module, name, sample_one)
        with pytest.raises(KeyboardInterrupt): train(TOY, PAIRS, out, **LONG[model])

@pytest.mark.parametrize('model', ['sdxl', pytest.param('flux', marks=pytest.mark.long('three trainings, 20 s'))])
def test_killed_trainings_end_as_uninterrupted_ones(model, tmp_path, monkeypatch):
    "Killed while training, interrupted while sampling, resumed: the same bits, with stochastic rounding, flips and dropout"
    train, out = {'sdxl': train_sdxl, 'flux': train_flux}[model], tmp_path/model
    train(TOY, PAIRS, tmp_path/'uninterrupted', **LONG[model])
    kill_while_training(model, out)
    interrupt_while_sampling(model, out, monkeypatch)
    train(TOY, PAIRS, out, **LONG[model])
    assert same_result(tmp_path/'uninterrupted', out)
    log = pd.read_json(out/'log.jsonl', lines=True)
    assert log.step.tolist() == [*range(1, len(log)+1)]
    assert pd.read_json(out/'validation.jsonl', lines=True).step.is_unique

def test_the_latent_cache_changes_nothing(tmp_path):
    for name, cache in (('cached', True), ('uncached', False)):
        train_sdxl(TOY, PAIRS, tmp_path/name/'out', cache_latents=cache, flip_probability=.5, **QUICK_SDXL)
    assert same_result(tmp_path/'cached'/'out', tmp_path/'uncached'/'out')
    files = sorted((tmp_path/'cached'/'latents').glob('*.safetensors'))
    assert files and not (tmp_path/'uncached'/'latents').exists()
    times = [p.stat().st_mtime_ns for p in files]
    train_sdxl(TOY, PAIRS, tmp_path/'cached'/'again', flip_probability=.5, **QUICK_SDXL)
    assert [p.stat().st_mtime_ns for p in files] == times         # the second training encoded nothing
    assert same_result(tmp_path/'cached'/'out', tmp_path/'cached'/'again')

def test_fused_back_pass_changes_nothing(tmp_path):
    for fused in (False, True): train_sdxl(TOY, PAIRS, tmp_path/str(fused), fused_back_pass=fused, **QUICK_SDXL)
    assert same_result(tmp_path/'False', tmp_path/'True')

def test_a_model_that_is_frozen_early_stays_in_the_checkpoint(tmp_path):
    train_sdxl(TOY, PAIRS, tmp_path/'out', **dict(QUICK_SDXL, epochs=2, text_encoder_epochs=1))
    assert any(k.startswith('text_encoder_2/') for k in checkpoint(tmp_path/'out'))

# ---- what is trained, and what is saved

def changed_models(out, base):
    "Names of the models in a checkpoint whose weights differ from those of a pipeline"
    changed = set()
    for key, value in checkpoint(out).items():
        name, _, weight = key.partition('/')
        if name not in base: continue
        if not torch.equal(value, base[name].state_dict()[weight].to(value)): changed.add(name)
    return changed

@pytest.mark.parametrize('options,trained', [
    (dict(text_encoder='frozen', text_encoder_2='offloaded'), {'unet'}),
    (dict(train_denoiser=False, lr=1e-5, text_encoder_lr=1e-3), {'text_encoder', 'text_encoder_2'}),
    (dict(optimizer='adamw', text_encoder='frozen', text_encoder_lr=1e-3), {'unet', 'text_encoder_2'})])
def test_frozen_models_do_not_change(options, trained, tmp_path):
    train_sdxl(TOY, PAIRS, tmp_path/'out', **QUICK_SDXL | options)
    base = load_sdxl('tiny-sdxl-random')
    models = {k: getattr(base, k) for k in ('unet', 'text_encoder', 'text_encoder_2')}
    assert changed_models(tmp_path/'out', models) == trained

def test_cached_embeddings_equal_computed_ones(tmp_path):
    first_losses = {}
    for mode in ('trained', 'frozen', 'offloaded'):
        train_sdxl(TOY, PAIRS, tmp_path/mode, text_encoder=mode, text_encoder_2=mode, **QUICK_SDXL)
        first_losses[mode] = json.loads((tmp_path/mode/'log.jsonl').read_text().splitlines()[0])['loss']
    assert first_losses['frozen'] == first_losses['offloaded']
    assert abs(first_losses['trained']-first_losses['frozen']) < 1e-5
    assert same_result(tmp_path/'frozen', tmp_path/'offloaded')

@pytest.mark.parametrize('model', ['sdxl', 'flux'])
def test_saved_models_load_in_diffusers(model, tmp_path):
    "diffusers' own classes load what was saved, and generate the same images"
    import diffusers
    train, sample, load, quick, class_name = {
        'sdxl': (train_sdxl, sample_sdxl, load_sdxl, QUICK_SDXL, 'StableDiffusionXLInpaintPipeline'),
        'flux': (train_flux, sample_flux, load_flux, QUICK_FLUX, 'FluxFillPipeline')}[model]
    out = tmp_path/'out'
    train(TOY, PAIRS, out, text_encoder_lr=1e-2, **quick)
    assert json.loads((out/'model'/'model_index.json').read_text())['_class_name'] == class_name
    dtype = torch.float32 if model == 'sdxl' else torch.bfloat16
    pipe = getattr(diffusers, class_name).from_pretrained(out/'model', torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    images = sample(pipe, *PAIRS[1:], PAIRS.names, num_inference_steps=1)
    assert np.array_equal(images[0], read_image(out/'raw'/'0001'/f'{PAIRS.names[0]}.png'))
    composited = composite(PAIRS.images, images, PAIRS.masks)
    assert np.array_equal(composited[1], read_image(out/'samples'/'0001'/f'{PAIRS.names[1]}.png'))
    encoders = [p.text_encoder_2.parameters() for p in (pipe, load(quick['base_model']))]
    assert any(not torch.equal(a.float(), b.float()) for a, b in zip(*encoders))

@pytest.mark.parametrize('model', ['sdxl', 'flux'])
def test_adapters_load_in_diffusers(model, tmp_path):
    train, sample, load, quick = {'sdxl': (train_sdxl, sample_sdxl, load_sdxl, QUICK_SDXL),
                                  'flux': (train_flux, sample_flux, load_flux, QUICK_FLUX)}[model]
    quick = dict(quick, lora_rank=2, text_encoder_lr=1e-2)
    if model == 'flux': quick |= dict(text_encoder_2='frozen')
    out = tmp_path/'out'
    train(TOY, PAIRS, out, **quick | dict(lr=1e-2, epochs=2))
    pipe = load(quick['base_model'])
    before = sample(pipe, *PAIRS[1:], PAIRS.names, num_inference_steps=1)
    pipe.load_lora_weights(out/'model')
    after = sample(pipe, *PAIRS[1:], PAIRS.names, num_inference_steps=1)
    assert np.array_equal(after[0], read_image(out/'raw'/'0002'/f'{PAIRS.names[0]}.png'))
    assert not np.array_equal(after, before)
    assert all('lora' in k for k in checkpoint(out) if k.startswith(('unet', 'transformer', 'text')))
    if model == 'flux':
        with pytest.raises(ValueError, match='no adapters of T5'):
            train(TOY, PAIRS, tmp_path/'t5', **quick | dict(text_encoder_2='trained'))

def test_the_saved_model_may_have_another_dtype(tmp_path):
    train_sdxl(TOY, PAIRS, tmp_path/'out', output_dtype='bfloat16', **QUICK_SDXL)
    saved = load_file(tmp_path/'out'/'model'/'unet'/'diffusion_pytorch_model.safetensors')
    trained = checkpoint(tmp_path/'out')
    assert {v.dtype for v in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(v, trained[f'unet/{k}'].bfloat16()) for k, v in saved.items())

def test_a_vae_with_another_downsampling_factor(tmp_path):
    from diffusers import AutoencoderKL
    pipe = tiny_sdxl()
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4, 8, 8), norm_num_groups=4, force_upcast=False,
                        down_block_types=['DownEncoderBlock2D']*3, up_block_types=['UpDecoderBlock2D']*3)
    base = tmp_path/'factor4'
    type(pipe)(**{**pipe.components, 'vae': vae}, add_watermarker=False).save_pretrained(base)
    assert load_sdxl(str(base)).vae_scale_factor == 4
    train_sdxl(TOY, PAIRS, tmp_path/'out', **dict(QUICK_SDXL, base_model=str(base)))
    assert len(list((tmp_path/'out'/'samples'/'0001').glob('*.png'))) == 2

# ---- use from outside

def test_the_command_line_trains_on_a_onetrainer_folder(tmp_path):
    write_onetrainer_folder(tmp_path/'data', TOY)
    options = QUICK_SDXL | {'gradient_checkpointing': 'false'}
    arguments = [a for k, v in options.items() for a in (f'--{k}', str(v))]
    arguments += ['--train_data_dir', str(tmp_path/'data'), '--size', '32', '--out', str(tmp_path/'out')]
    out = train_cli(train_sdxl, SDXL, arguments)
    train_sdxl(TOY, TOY, tmp_path/'direct', **QUICK_SDXL)
    assert same_result(tmp_path/'direct', tmp_path/'out') and out == tmp_path/'out'
    assert {p.stem for p in (out/'samples'/'0001').glob('*.png')} == set(TOY.names)
    with pytest.raises(SystemExit, match='expected either --train_data_dir'): train_cli(train_sdxl, SDXL, ['--out', 'x'])

def test_the_log_has_its_columns(tmp_path):
    train_sdxl(TOY, PAIRS, tmp_path/'out', **dict(QUICK_SDXL, unmasked_probability=.5, epochs=4))
    log, validation = (pd.read_json(tmp_path/'out'/f'{k}.jsonl', lines=True) for k in ('log', 'validation'))
    columns = {'step', 'epoch', 'loss', 'loss_inside_mask', 'loss_outside_mask', 'mask_area', 'fully_masked_share',
               'grad_norm', 'lr', 'text_encoder_lr', 'seconds_per_step', 'eta_seconds'}
    assert columns == set(log.columns)
    assert 0 < log.fully_masked_share.mean() < 1 and (log.grad_norm > 0).all() and log.eta_seconds.iloc[-1] == 0
    assert validation.epoch[0] == 0 and {'loss_t_100', 'loss_t_900'} <= set(validation.columns)
    assert np.isfinite(validation.loss_inside_mask).all()
