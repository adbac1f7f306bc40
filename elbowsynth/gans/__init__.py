"WGAN-GP, AC-GAN and TAC-GAN; public names, each imported from its module when first used"
from elbowsynth.core import lazy_exports

PUBLIC = {                          # public name to module
    'fixed_noise': 'gan', 'one_hot_labels': 'gan', 'generate': 'gan', 'sample_checkpoint': 'gan',
    'plot_losses': 'gan', 'plot_samples': 'gan',
    'WGANGPConfig': 'settings', 'ACGANConfig': 'settings', 'TACGANConfig': 'settings',
    'Critic': 'wgan_gp', 'gradient_penalty': 'wgan_gp', 'critic_loss': 'wgan_gp',
    'generator_loss': 'wgan_gp', 'train_wgan_gp': 'wgan_gp',
    'Discriminator': 'ac_gan', 'discriminator_losses': 'ac_gan', 'generator_losses': 'ac_gan',
    'train_ac_gan': 'ac_gan',
    'TwinClassifier': 'tac_gan', 'train_tac_gan': 'tac_gan',
    'search_hyperparameters': 'search', 'plot_search': 'search'}
__all__ = lazy_exports(__name__, PUBLIC)
