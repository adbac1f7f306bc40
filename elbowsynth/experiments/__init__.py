"Controlled experiments on simulated data; public names, each imported from its module when first used"
from elbowsynth.core import lazy_exports

PUBLIC = {                          # public name to module
    'make_counterfactual': 'finetuning_effect', 'make_counterfactuals': 'finetuning_effect',
    'lesion_coefficient': 'finetuning_effect', 'run_finetuning_effect': 'finetuning_effect',
    'effect_table': 'finetuning_effect', 'plot_effects': 'finetuning_effect',
    'run_ablation': 'ablation', 'ablation_table': 'ablation', 'plot_ablation': 'ablation'}
__all__ = lazy_exports(__name__, PUBLIC)
