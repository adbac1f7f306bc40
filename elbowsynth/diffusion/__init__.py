"SDXL and FLUX.1-Fill, fine-tuned to inpaint a pathology; public names, each imported from its module when first used"
from elbowsynth.core import lazy_exports

PUBLIC = {                          # public name to module
    'Adafactor': 'adafactor', 'stochastic_round': 'adafactor',
    'count_params': 'model_sizes', 'memory_plan': 'model_sizes', 'memory_table': 'model_sizes',
    'disk_plan': 'model_sizes', 'check_weights': 'model_sizes',
    'resolve_base_model': 'base_models', 'load_base_pipeline': 'base_models',
    'InpaintDataset': 'latents', 'load_inpaint_data': 'latents',
    'read_onetrainer_folder': 'latents', 'write_onetrainer_folder': 'latents',
    'masked_image': 'latents',
    'FineTuneConfig': 'settings', 'SDXL': 'settings', 'FLUX': 'settings',
    'masked_mse': 'objective',
    'composite': 'sampling', 'inpaint_images': 'sampling', 'add_pathology': 'sampling',
    'fine_tune': 'finetune', 'plot_masked_losses': 'finetune',
    'load_sdxl': 'sdxl', 'train_sdxl': 'sdxl', 'sample_sdxl': 'sdxl',
    'load_flux': 'flux', 'train_flux': 'flux', 'sample_flux': 'flux',
    'normal_image': 'pretraining', 'normal_images': 'pretraining', 'pretrain': 'pretraining'}
__all__ = lazy_exports(__name__, PUBLIC)
