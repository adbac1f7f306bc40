"SSIM, MS-SSIM, MMD, baselines and statistics; public names, each imported from its module when first used"
from elbowsynth.core import lazy_exports

PUBLIC = {                          # public name to module
    'load_extractor': 'extractors', 'features': 'extractors',
    'ssim': 'ssim', 'ms_ssim': 'ssim', 'SSIM_CONVENTIONS': 'ssim', 'MS_SSIM_CONVENTIONS': 'ssim',
    'mmd2': 'mmd', 'kid': 'mmd', 'prdc': 'mmd', 'vendi': 'mmd', 'set_metrics': 'mmd',
    'MMD_CONVENTIONS': 'mmd',
    'noise_baseline': 'baselines', 'mean_fill': 'baselines', 'telea_inpaint': 'baselines',
    'vae_reconstruct': 'baselines', 'matched_real_images': 'baselines', 'region_masks': 'baselines',
    'cluster_bootstrap': 'stats', 'mmd_jackknife': 'stats', 'paired_tests': 'stats',
    'permutation_test': 'stats', 'tost': 'stats', 'holm_correction': 'stats',
    'best_checkpoints': 'metrics', 'checkpoint_selection': 'metrics', 'score_run': 'metrics',
    'implied_noise': 'conventions', 'possible_conventions': 'conventions',
    'distort': 'sensitivity', 'memorization_rate': 'sensitivity'}
__all__ = lazy_exports(__name__, PUBLIC)
