"""plprune makes large language models smaller while they train.

The engine needs torch alone; Lightning lives in `plprune.lit` and `plprune.callbacks`.
"""

from plprune.budget import Budget as Budget
from plprune.count import count_params as count_params
from plprune.describe import describe as describe
from plprune.export import save_hf as save_hf
from plprune.load import load_hf as load_hf
from plprune.observe import observe as observe
from plprune.plan import Keep as Keep
from plprune.plan import Mask as Mask
from plprune.plan import Plan as Plan
from plprune.plan import Write as Write
from plprune.report import Report as Report
from plprune.spec import Axis as Axis
from plprune.spec import Spec as Spec
from plprune.surgery.apply import apply as apply
from plprune.surgery.rebuild import rebuild as rebuild
