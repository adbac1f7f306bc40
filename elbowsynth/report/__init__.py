"The report of a run: figures, tables and claims; public names, each imported from its module when first used"
from elbowsynth.core import lazy_exports

PUBLIC = {                          # public name to module
    'open_run': 'run_summary', 'run_summary_text': 'run_summary', 'table1': 'run_summary',
    'ranking': 'run_summary',
    'learning_curves': 'figures', 'sample_grid': 'figures', 'table1_figure': 'figures',
    'model_figures': 'figures',
    'architecture': 'tables', 'gan_settings': 'tables', 'table2': 'tables', 'table3': 'tables',
    'table7': 'tables', 'run_tables': 'tables',
    'RunResults': 'claims', 'claims_text': 'claims',
    'Finding': 'report', 'findings': 'report', 'read_evidence': 'report', 'warnings': 'report',
    'write_page': 'report'}
__all__ = lazy_exports(__name__, PUBLIC)
