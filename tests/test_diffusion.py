"The inpainting models: Table 7, recipes, resuming after a kill, what is trained and saved, and use from outside"
import inspect, json, os, shutil, signal, subprocess, sys
from dataclasses import asdict, fields, replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from conftest import N_KILLS, ROOT
from kills import differing_files, fork_run, run_with_kills
from elbowsynth.data.images import read_image
from elbowsynth.diffusion import flux, sdxl
from elbowsynth.diffusion.base_models import load_lora, tiny_vae
from elbowsynth.diffusion.distributed import DistributedContext
from elbowsynth.diffusion.finetune import (
    evaluation_config, fine_tune, learning_rates, make_optimizer, resume_config, Schedule, train_cli)
from elbowsynth.diffusion.flux import load_flux, sample_flux, train_flux
from elbowsynth.diffusion.latents import (
    InpaintDataset, read_onetrainer_folder, toy_data, write_onetrainer_folder)
from elbowsynth.diffusion.objective import ModelSpec
from elbowsynth.diffusion.sampling import composite, inpaint_images
from elbowsynth.diffusion.sdxl import load_sdxl, sample_sdxl, tiny_sdxl, train_sdxl
from elbowsynth.diffusion.settings import (
    build_parser, CONFIGS, DTYPE_FIELDS, FineTuneConfig, FLUX, make_config, RECIPES, resolve_config,
    SDXL, unused_table7_rows)
from elbowsynth.training import (
    DamagedFile, load_checkpoint, lock_training, previous_checkpoint, save_checkpoint, TrainingDiverged)

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
    assert set(cell)-set(options) == {'run', 'split', 'masks', 'images', 'out', 'size', 'options', 'n_gpus'}
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

def test_mixed_dtypes_that_cannot_sample_are_refused_at_the_start():
    with pytest.raises(ValueError, match="text_encoder_dtype='bfloat16' differs from prior_dtype='float32': expected train_dtype"):
        resolve_config(make_config(SDXL, text_encoder_dtype='bfloat16'))
    resolve_config(make_config(SDXL, text_encoder_dtype='bfloat16', train_dtype='bfloat16'))

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

LONG = {'sdxl': dict(QUICK_SDXL, epochs=3, boost_epochs=1, checkpoint_every=2, flip_probability=.5, max_translation_px=8),
        'flux': dict(QUICK_FLUX, epochs=3, boost_epochs=1, checkpoint_every=2)}

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
    def train_long(folder): train(TOY, PAIRS, folder, **LONG[model])
    assert fork_run(train_long, out, 200, tmp_path/'operations.txt') == -signal.SIGKILL
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
    dtype = torch.float32 if model == 'sdxl' else {'default': torch.bfloat16, 'vae': torch.float32}
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

# ---- a training of two numbers, in a tenth of a second

class ToyPipeline:
    "A linear denoiser and a linear text encoder"
    components = {}
    def __init__(self):
        torch.manual_seed(0)
        self.unet, self.text_encoder = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        self.vae = tiny_vae(4).eval()
    def save_pretrained(self, path):
        path.mkdir(parents=True)
        save_file(self.unet.state_dict(), path/'unet.safetensors')

def toy_encode(pipe, captions): return (pipe.text_encoder(torch.ones(len(captions), 1)),)
def toy_timesteps(generator): return torch.rand(1, generator=generator)
def toy_sample(pipe, folder, distributed):
    "Images as bright as a weight"
    images = np.full_like(PAIRS.images, int(abs(pipe.unet.weight.item())*100)%256)
    for name, image in zip(PAIRS.names, images):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder/f'{name}.png')
    return images

TOY_OPTIONS = dict(epochs=2, boost_epochs=1, checkpoint_every=1, batch_size=2, lr=.1, boost_lr=.5,
                   text_encoder_lr=.01, gradient_checkpointing=False, n_validation=1)

def toy_tune(out, nan_after=None, test=PAIRS, train=TOY, **options):
    "Fine-tune the toy; with `nan_after`, the gradient of a later step is NaN while its loss is finite"
    steps = []
    def predict(pipe, batch, prompt_embeds):
        pred = pipe.unet(prompt_embeds[0][0]*batch.latents.mean((1, 2, 3))[:, None])
        if pipe.unet.training and torch.is_grad_enabled():
            steps.append(1)
            if nan_after is not None and len(steps) > nan_after: pred = pred+0*(pred-pred).sqrt()
        return pred[..., None, None].expand_as(batch.noise), batch.noise, torch.ones(len(pred))
    spec = ModelSpec('unet', {'text_encoder': toy_encode}, toy_timesteps, [.2, .8], predict)
    config = resolve_config(make_config(SDXL, **TOY_OPTIONS | options))
    return fine_tune(lambda device: ToyPipeline(), spec, toy_sample, train, test, Path(out), config, DistributedContext())

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory): return toy_tune(tmp_path_factory.mktemp('undisturbed')/'run'/'out')

def same_files(a, b): return differing_files(a.parent, b.parent) == []

# ---- diverged trainings

@pytest.mark.parametrize('options,steps', [({}, 3), ({'fused_back_pass': True}, 3), ({}, 7), ({}, 2)], ids=str)
def test_nan_never_reaches_a_checkpoint(options, steps, undisturbed, tmp_path):
    "Step 3 is a checkpoint, step 7 is boosted, and the loss before the gradient is finite in all"
    out = tmp_path/'run'/'out'
    # A gradient that is used up has no norm: the checkpoint, or the loss of the next step, is what notices
    with pytest.raises(TrainingDiverged, match=f'diverged at step {steps}: '): toy_tune(out, nan_after=steps-1, **options)
    for path in out.glob('*.safetensors'):
        assert all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point()), path
    record = json.loads((out/'diverged.json').read_text())
    assert record['step'] == steps and record['restored_step'] == {3: 0, 7: 6, 2: 0}[steps]
    toy_tune(out, **options)                                        # without the NaN it goes on
    differing = differing_files(undisturbed.parent, out.parent)     # a gradient that is used up has no norm in the log
    assert differing == (['out/log.jsonl'] if options else [])

def test_nan_in_an_optimizer_state_is_noticed(tmp_path):
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path/'c.safetensors', {'net': net}, {'opt': optimizer}, step=1)
    optimizer.state[net.weight]['exp_avg'][0, 0] = torch.inf
    with pytest.raises(TrainingDiverged, match='at step 2: opt/0/exp_avg is NaN or infinite'):
        save_checkpoint(tmp_path/'c.safetensors', {'net': net}, {'opt': optimizer}, step=2)
    assert load_checkpoint(tmp_path/'c.safetensors', {})['step'] == 1

# ---- damaged files

def cut(path): os.truncate(path, path.stat().st_size*2//3)
def empty(path): os.truncate(path, 0)
def change(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)
def damage_header(path): change(path, 12)
def damage_state(path): change(path, path.read_bytes().index(b'step')+9)
def damage_weights(path): change(path, -1)
def remove(path): path.unlink()
DAMAGES = [cut, empty, damage_header, damage_state, damage_weights, remove]

@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name', ['checkpoint', 'boosted'])
def test_damaged_checkpoints_are_replaced(name, damage, undisturbed, tmp_path, capsys):
    out = tmp_path/'run'/'out'
    shutil.copytree(undisturbed.parent, out.parent)
    if name == 'checkpoint': (out/'boosted.safetensors').unlink()
    damage(out/f'{name}.safetensors')
    toy_tune(out)
    printed = capsys.readouterr().out
    assert f'{name}.safetensors is ' in printed or damage is remove
    assert 'resumes at step' in printed
    assert damage is remove or 'is used' in printed or 'trained again' in printed
    assert same_files(undisturbed, out)

def test_without_a_good_checkpoint_all_are_named(undisturbed, tmp_path):
    out = tmp_path/'run'/'out'
    shutil.copytree(undisturbed.parent, out.parent)
    path = out/'checkpoint.safetensors'
    for file in (path, previous_checkpoint(path)): cut(file)
    with pytest.raises(DamagedFile, match='checkpoint.safetensors is damaged .*checkpoint-previous.safetensors is damaged .*fix: '):
        toy_tune(out)

@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_latents_are_made_anew(damage, undisturbed, tmp_path, capsys):
    out = tmp_path/'run'/'out'
    shutil.copytree(undisturbed.parent/'latents', out.parent/'latents')
    for path in (out.parent/'latents').glob('*.safetensors'):
        if damage is not damage_state: damage(path)
    toy_tune(out)
    assert same_files(undisturbed, out)
    if damage in (cut, empty): assert 'it is made anew' in capsys.readouterr().out

@pytest.mark.parametrize('name', ['config.json', 'evaluation.json'])
def test_a_damaged_configuration_loses_nothing(name, undisturbed, tmp_path, capsys):
    out = tmp_path/'run'/'out'
    shutil.copytree(undisturbed.parent, out.parent)
    cut(out/name)
    toy_tune(out)
    kept = {'config.json': out.parent/'out-damaged-1'/'checkpoint.safetensors',
            'evaluation.json': out/'evaluation-previous-1'/'samples'/'0000'}[name]
    assert kept.exists() and kept.parts[-2 if name == 'config.json' else -3] in capsys.readouterr().out

def test_a_damaged_file_of_a_saved_model_is_named(tmp_path):
    "A tokenizer and weights, byte by byte the same size"
    train_sdxl(TOY, PAIRS, tmp_path/'out', **QUICK_SDXL)
    for name in ('tokenizer/tokenizer.json', 'vae/diffusion_pytorch_model.safetensors'):
        path = tmp_path/'out'/'model'/name
        before = path.read_bytes()
        change(path, len(before)//2)
        with pytest.raises(ValueError, match=f'{name} of .* files in .* damaged'): load_sdxl(str(tmp_path/'out'/'model'))
        path.write_bytes(before)
    load_sdxl(str(tmp_path/'out'/'model'))

# ---- kills at file operations

def test_kills_at_file_operations_change_nothing(undisturbed, tmp_path):
    differing = run_with_kills(toy_tune, tmp_path, n_kills=6)
    assert differing == {moment: [] for moment in differing}

def train_sdxl_twice(out):
    "The second training resumes from the first and adds boosted epochs"
    options = dict(QUICK_SDXL, flip_probability=.5, max_translation_px=8)
    train_sdxl(TOY, PAIRS, out, **options)
    train_sdxl(TOY, PAIRS, out, **options | dict(epochs=2, boost_epochs=1))

def train_flux_once(out): train_flux(TOY, PAIRS, out, **QUICK_FLUX)

@pytest.mark.long('kills and as many resumed trainings of each model, minutes')
def test_trainings_end_the_same_after_many_kills(tmp_path):
    for target in ('train_sdxl_twice', 'train_flux_once'):
        differing = run_with_kills(f'test_diffusion:{target}', tmp_path/target, n_kills=N_KILLS)
        assert len(differing) == N_KILLS and differing == {moment: [] for moment in differing}

def test_a_checkpoint_is_saved_after_a_kill_between_link_and_replace(tmp_path):
    "The temporary name and the previous checkpoint are then the same file as the checkpoint"
    net, path = torch.nn.Linear(1, 1), tmp_path/'c.safetensors'
    save_checkpoint(path, {'net': net}, {}, step=1)
    os.link(path, previous_checkpoint(path))
    os.link(path, tmp_path/f'.part-{previous_checkpoint(path).name}')
    save_checkpoint(path, {'net': net}, {}, keep_previous=True, step=2)
    assert [load_checkpoint(p, {})['step'] for p in (path, previous_checkpoint(path))] == [2, 1]
    kept = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith('.part-'))    # leftovers go at the next start
    assert kept == [previous_checkpoint(path).name, path.name]

def test_one_training_per_folder(tmp_path):
    out = tmp_path/'out'
    with lock_training(out):
        with pytest.raises(RuntimeError, match=f'another process \\(pid {os.getpid()}\\) is training in .*out; .*fix: '):
            toy_tune(out)
        assert not out.exists()
    pid = os.fork()
    if pid == 0:
        with lock_training(out): os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL and (tmp_path/'.out.lock').exists()
    with lock_training(out): pass                                   # released when its owner died
    assert not (tmp_path/'.out.lock').exists()

# ---- what decides whether a training resumes

HARMLESS = dict(checkpoint_every=2, num_inference_steps=9, guidance_scale=3., n_validation=0, sample_batch_size=1,
                output_dtype='bfloat16', cache_latents=False, max_minutes=9., boost_lr=.3, fused_back_pass=True,
                device='cpu')

def trained_tensors(out):
    return {f'{p.stem}/{k}': v for p in sorted(out.glob('*.safetensors')) for k, v in load_file(p).items()
            if not p.stem.endswith('-previous') and not k.startswith('rng/')}

@pytest.mark.parametrize('name', list(HARMLESS))
def test_a_harmless_change_does_not_start_again(name, tmp_path, capsys):
    out, changed = tmp_path/'out', {name: HARMLESS[name]}
    toy_tune(out, epochs=1, boost_epochs=0)
    capsys.readouterr()
    toy_tune(out, **changed)
    assert 'out: resumes at step 3 of 9, epoch 1\n' in capsys.readouterr().out
    fresh = toy_tune(tmp_path/'fresh', **changed)
    one, two = trained_tensors(out), trained_tensors(fresh)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert not (tmp_path/'out-previous-1').exists()

def test_a_finished_training_follows_harmless_changes(undisturbed, tmp_path):
    out = tmp_path/'run'/'out'
    shutil.copytree(undisturbed.parent, out.parent)
    toy_tune(out, output_dtype='bfloat16')
    assert json.loads((out/'model'/'training_state.json').read_text())['output_dtype'] == 'bfloat16'
    toy_tune(out, num_inference_steps=7, output_dtype='bfloat16')
    assert [p.name for p in (out/'samples').iterdir()] == ['0003']
    assert len(list((out/'evaluation-previous-1'/'samples').iterdir())) == 4
    weights = trained_tensors(out)
    assert all(torch.equal(v, weights[k]) for k, v in trained_tensors(undisturbed).items())
    other_pairs = InpaintDataset(*(field[2:4] for field in TOY))
    toy_tune(out, test=other_pairs, num_inference_steps=7, output_dtype='bfloat16')
    assert (out/'evaluation-previous-2'/'samples'/'0003').is_dir()
    assert {p.stem for p in (out/'raw'/'0003').iterdir()} == set(PAIRS.names)   # the toy always writes these
    assert evaluation_config(PAIRS, SDXL) != evaluation_config(other_pairs, SDXL)

def test_fewer_epochs_than_were_trained_change_nothing(undisturbed, tmp_path, capsys):
    out = tmp_path/'run'/'out'
    shutil.copytree(undisturbed.parent, out.parent)
    toy_tune(out, epochs=1, boost_epochs=0)
    assert 'out: already at step 6; these epochs end at step 3' in capsys.readouterr().out
    assert same_files(undisturbed, out)

def test_a_fresh_start_says_why(tmp_path, capsys):
    toy_tune(tmp_path/'out', epochs=1, boost_epochs=0)
    assert 'out: starts at step 0 of 3 (no checkpoint yet)' in capsys.readouterr().out
    toy_tune(tmp_path/'out', epochs=1, boost_epochs=0, lr=.2)
    assert 'out: starts at step 0 of 3 (lr was 0.1, is 0.2)' in capsys.readouterr().out
    five = InpaintDataset(*(field[:5] for field in TOY))
    toy_tune(tmp_path/'out', train=five, epochs=1, boost_epochs=0, lr=.2)
    assert 'starts at step 0 of 3 (data_hash was' in capsys.readouterr().out

def test_the_length_decides_where_the_schedule_depends_on_it():
    "A cosine ends with the training, so that another length gives other weights from the first step"
    longer = replace(SDXL, epochs=300)
    assert resume_config(longer) == resume_config(SDXL)
    cosine, longer_cosine = (replace(c, lr_scheduler='cosine') for c in (SDXL, longer))
    assert resume_config(cosine) != resume_config(longer_cosine)
    assert 'guidance_scale' in resume_config(FLUX) and 'guidance_scale' not in resume_config(SDXL)

# ---- each option reaches the training

# For each option: its other value, and what else must be set for it to have an effect
EFFECTS = {
    'base_model': ('other', {}), 'epochs': (2, {}), 'batch_size': (2, {}), 'lr': (2e-3, {}),
    'boost_epochs': (1, {}), 'boost_lr': (1e-2, dict(boost_epochs=1)), 'text_encoder_lr': (1e-2, {}),
    'lr_scheduler': ('linear', {}), 'lr_warmup_steps': (5, {}), 'max_grad_norm': (1e-4, dict(optimizer='adamw')),
    'optimizer': ('adamw', {}), 'scale_parameter': (True, {}), 'relative_step': (True, dict(lr=1e-5)),
    'warmup_init': (True, dict(relative_step=True, lr=1e-5)), 'decay_rate': (-.1, dict(epochs=2)),
    'stochastic_rounding': (True, dict(weight_dtype='bfloat16')), 'train_denoiser': (False, dict(lr=1e-5)),
    'denoiser_epochs': (1, dict(epochs=2)), 'text_encoder': ('frozen', {}), 'text_encoder_2': ('frozen', {}),
    'text_encoder_epochs': (1, dict(epochs=2)), 'lora_rank': (2, {}), 'ema_decay': (.5, {}),
    'mask_weighted_loss': (False, {}), 'unmasked_weight': (.1, {}), 'normalize_masked_area_loss': (True, {}),
    'loss_weight_fn': ('min-snr', {}), 'snr_gamma': (1., dict(loss_weight_fn='min-snr')),
    'loss_scaler': ('batch', dict(optimizer='adamw', max_grad_norm=0.)), 'unmasked_probability': (1., {}),
    'sample_masked_latents': (False, {}), 'flip_probability': (1., {}), 'max_translation_px': (8, {}),
    'fixed_augmentation': (True, dict(flip_probability=.5)), 'weight_dtype': ('bfloat16', {}),
    'prior_dtype': ('bfloat16', dict(train_dtype='bfloat16')),
    'text_encoder_dtype': ('bfloat16', dict(train_dtype='bfloat16')), 'vae_dtype': ('bfloat16', {}),
    'train_dtype': ('bfloat16', {}), 'seed': (1, {})}
FLUX_EFFECTS = {'timestep_offset': (.01, {}), 'max_sequence_length': (20, {}), 'guidance_scale': (1., {}),
                'loss_weight_fn': ('sigma', {}), 'text_encoder_2': ('frozen', {})}
# What changes other files than the checkpoints, or nothing; `soft_mask` needs masks that are not binary
NO_EFFECT = {'model', 'recipe', 'soft_mask', 'checkpoint_every', 'fused_back_pass', 'output_dtype', 'gradient_checkpointing',
             'cache_latents', 'fsdp', 'device', 'max_minutes', 'n_validation', 'num_inference_steps', 'sample_batch_size',
             'stop_epoch', 'sample_epoch'}                          # of parts: test_parts.py

def test_each_option_is_tried():
    assert EFFECTS.keys() | FLUX_EFFECTS.keys() | NO_EFFECT == {f.name for f in fields(FineTuneConfig)}
    on_weights = resume_config(FLUX).keys() - {'model', 'recipe', 'soft_mask'}
    assert on_weights | {'epochs', 'boost_epochs', 'boost_lr'} == EFFECTS.keys() | FLUX_EFFECTS.keys()

def option_has_effect(model, name, folder):
    "Whether the checkpoints of a short training change with an option"
    train, quick, effects = {'sdxl': (train_sdxl, QUICK_SDXL, EFFECTS), 'flux': (train_flux, QUICK_FLUX, FLUX_EFFECTS)}[model]
    value, others = effects[name]
    if name == 'base_model':
        value = str(folder/'base')
        tiny_sdxl(seed=1).save_pretrained(value)
    options = dict(quick, n_validation=0) | others
    before = train(TOY, PAIRS, folder/'before', **options)
    after = train(TOY, PAIRS, folder/'after', **options | {name: value})
    one, two = trained_tensors(before), trained_tensors(after)
    return one.keys() != two.keys() or any(not torch.equal(one[k], two[k]) for k in one)

@pytest.mark.long('two trainings for each of 45 options, 3 minutes')
def test_each_option_changes_the_training(tmp_path):
    cases = [('sdxl', k) for k in EFFECTS]+[('flux', k) for k in FLUX_EFFECTS]
    without = [f'{model}: {name}' for model, name in cases if not option_has_effect(model, name, tmp_path/f'{model}-{name}')]
    assert without == []

@pytest.mark.parametrize('model', ['sdxl', 'flux'])
def test_sampling_has_all_settings(model, tmp_path, monkeypatch):
    "Each setting is an argument of the function that draws the samples, and of the pipeline's call"
    module, train, config = {'sdxl': (sdxl, train_sdxl, SDXL), 'flux': (flux, train_flux, FLUX)}[model]
    settings = dict(num_inference_steps=7, guidance_scale=3.25, sample_batch_size=3, seed=5, max_minutes=99.)
    if model == 'flux': settings['max_sequence_length'] = 21
    calls = []
    def inpaint(*args, **kwargs):
        calls.append(inspect.signature(inpaint_images).bind(*args, **kwargs).arguments)
        return PAIRS.images
    monkeypatch.setattr(module, 'inpaint_images', inpaint)
    def fine_tune(load_pipeline, spec, sample, train, test, out, config, distributed):
        sample(load_pipeline(distributed.device), tmp_path, distributed)
    monkeypatch.setattr(module, 'fine_tune', fine_tune)
    train(TOY, PAIRS, tmp_path/'out', base_model=f'tiny-{model}-random', device='cpu', **settings)
    call, = calls
    received = call | call['pipeline_kwargs']
    expected = {'batch_size' if k == 'sample_batch_size' else k: v for k, v in settings.items()}
    assert {k: received[k] for k in expected} == expected and received['strength'] == 1
    assert received['captions'] == PAIRS.captions and received['seed_keys'] == PAIRS.names

def test_the_optimizer_has_all_settings():
    "Adafactor's options, and torch's values of AdamW, which the paper does not name"
    pipe = ToyPipeline()
    spec, models = ModelSpec('unet', {}, None, [], None), {'unet': pipe.unet, 'text_encoder': pipe.text_encoder}
    changed = dict(decay_rate=-.5, stochastic_rounding=True, scale_parameter=True, relative_step=True, warmup_init=True)
    optimizer = make_optimizer(models, spec, replace(SDXL, **changed))
    assert {k: v for k, v in optimizer.param_groups[0].items() if k in changed} == changed
    adamw = make_optimizer(models, spec, replace(SDXL, optimizer='adamw', lr=.25))
    values = {k: adamw.defaults[k] for k in ('lr', 'betas', 'eps', 'weight_decay')}
    assert values == {'lr': .25, 'betas': (.9, .999), 'eps': 1e-8, 'weight_decay': .01}
    assert [g['is_text_encoder'] for g in adamw.param_groups] == [False, True]

# ---- files of others

@pytest.mark.parametrize('change', ['prefix', 'half', 'intact'])
def test_all_adapters_of_a_lora_are_loaded_or_none(change, tmp_path):
    "Other key prefixes, as other tools write them, loaded nothing, and the base model drew the images"
    train_sdxl(TOY, PAIRS, tmp_path/'out', **dict(QUICK_SDXL, lora_rank=2, text_encoder='frozen', text_encoder_2='frozen'))
    path, = (tmp_path/'out'/'model').glob('*.safetensors')
    adapters = load_file(path)
    if change == 'prefix': adapters = {k.replace('unet.', 'diffusion_model.unet.'): v for k, v in adapters.items()}
    if change == 'half': adapters = {k.replace('.to_q.', '.to_x.'): v for k, v in adapters.items()}
    other = tmp_path/'other'
    other.mkdir()
    save_file(adapters, other/path.name, metadata={'format': 'pt'})
    pipe = load_sdxl('tiny-sdxl-random')
    if change == 'intact': load_lora(pipe, other)
    else:
        with pytest.raises(ValueError, match=f'0 of {len(adapters)} adapter tensors|of {len(adapters)} adapter tensors of .*expected adapters'):
            load_lora(pipe, other)

def test_onetrainer_folders_are_read_as_other_images(tmp_path, capsys):
    "16 bits, color, alpha, masks of 0 and 1, gray masks, byte-order marks; all faults in one report"
    names = TOY.names
    folder = write_onetrainer_folder(tmp_path/'data', TOY)
    Image.fromarray(TOY.images[0].astype(np.uint16)*257).save(folder/f'{names[0]}.png')
    Image.fromarray(np.dstack([TOY.images[1]]*3)).save(folder/f'{names[1]}.png')
    Image.fromarray(np.dstack([TOY.images[2]]*3+[np.full((32, 32), 255, np.uint8)])).save(folder/f'{names[2]}.png')
    Image.fromarray(TOY.masks[0]//255).save(folder/f'{names[0]}-masklabel.png')
    Image.fromarray(TOY.masks[1]//2).save(folder/f'{names[1]}-masklabel.png')
    Image.fromarray(np.dstack([TOY.masks[2]]*3)).save(folder/f'{names[2]}-masklabel.png')
    (folder/f'{names[3]}.txt').write_bytes(b'\xef\xbb\xbf'+TOY.captions[3].encode())
    read = read_onetrainer_folder(folder, 32)
    assert np.array_equal(read.images, TOY.images) and np.array_equal(read.masks, TOY.masks)
    assert read.images.dtype == read.masks.dtype == np.uint8 and read.captions == TOY.captions
    assert capsys.readouterr().out == ''
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(folder/f'{names[4]}-masklabel.png')
    read_onetrainer_folder(folder, 32)
    assert 'data: 1 of 6 masks cover over 90 % of their image, which is generated anew: '+names[4] in capsys.readouterr().out.replace('90%', '90 %')

    Image.fromarray(TOY.masks[0]*0).save(folder/f'{names[0]}-masklabel.png')
    Image.fromarray(np.ones((16, 16), np.uint8)).save(folder/f'{names[1]}-masklabel.png')
    (folder/f'{names[2]}.txt').write_bytes('Bruch'.encode('utf-16'))
    (folder/f'{names[3]}.png').write_bytes(b'')
    shutil.copy(folder/f'{names[5]}.png', folder/'.hidden.png')
    with pytest.raises(ValueError) as error: read_onetrainer_folder(folder, 32)
    for message in (f'{names[0]}-masklabel.png is a mask without white pixels', f'{names[1]}-masklabel.png is 16 pixels wide, its image 32',
                    f'{names[2]}.txt is not UTF-8 text', f'{names[3]}.png cannot be read: it is empty'):
        assert message in str(error.value)

def test_cut_captions_are_reported(tmp_path, capsys):
    long = TOY._replace(captions=['fracture '*100, *TOY.captions[1:]])
    train_sdxl(long, PAIRS, tmp_path/'out', **QUICK_SDXL)
    assert 'captions have more than the 77 tokens that tokenizer reads' in capsys.readouterr().out
