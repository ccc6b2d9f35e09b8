"""Every figure. Functions return a matplotlib Figure and write nothing; only these modules import
it."""

from tinylab.figures.images import before_after as before_after
from tinylab.figures.images import class_maps as class_maps
from tinylab.figures.images import confident as confident
from tinylab.figures.images import gradcam_stages as gradcam_stages
from tinylab.figures.images import image_grid as image_grid
from tinylab.figures.images import label_conflicts as label_conflicts
from tinylab.figures.images import misclassified as misclassified
from tinylab.figures.images import prediction as prediction
from tinylab.figures.scores import class_accuracy as class_accuracy
from tinylab.figures.scores import confused_pairs as confused_pairs
from tinylab.figures.scores import confusion as confusion
from tinylab.figures.scores import faithfulness as faithfulness
from tinylab.figures.scores import localisation as localisation
from tinylab.figures.scores import reliability as reliability
from tinylab.figures.style import Figure as Figure
from tinylab.figures.style import SelfShowing as SelfShowing
from tinylab.figures.style import clean as clean
from tinylab.figures.style import message as message
from tinylab.figures.style import save as save
from tinylab.figures.training import accuracy_and_loss as accuracy_and_loss
from tinylab.figures.training import learning_rate_curve as learning_rate_curve
from tinylab.figures.training import learning_rate_test as learning_rate_test
