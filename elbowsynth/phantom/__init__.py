"Simulated elbow radiographs with ground truth; public names, each imported from its module when first used"
from elbowsynth.core import lazy_exports

PUBLIC = {                          # public name to module
    'Beam': 'geometry', 'Ellipsoid': 'geometry', 'Tube': 'geometry', 'path_length': 'geometry',
    'Arm': 'anatomy', 'sample_arm': 'anatomy', 'pose_arm': 'anatomy',
    'radiographic_measurements': 'anatomy',
    'apply_injuries': 'injuries',
    'Projection': 'exposure', 'expose': 'exposure', 'tone_map': 'exposure',
    'burn_in_annotations': 'artifacts',
    'Phantom': 'phantom', 'phantom': 'phantom', 'read_ground_truth': 'phantom',
    'write_phantom_dataset': 'phantom'}
__all__ = lazy_exports(__name__, PUBLIC)
