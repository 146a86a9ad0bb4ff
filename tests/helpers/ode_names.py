"""The rows of ODEDiagnostics by what they need, and which of them a logged step has."""

FIRST_ORDER = {
    "grad_norm", "update_norm", "rel_update", "cos_descent", "effective_lr", "predicted_dloss", "clip_factor",
    "skipped_steps", "loss",
}  # fmt: skip
ANY_KNOWN = FIRST_ORDER | {
    "time", "predicted2_dloss", "actual_dloss", "dloss_ratio", "curvature_step", "edge_ratio_step", "sharpness",
    "edge_ratio", "stiffness",
}  # fmt: skip
EULER = {"local_error", "rel_local_error", "lr_for_tol"}
IGR = {"igr_term", "igr_ratio"}


def names(row):
    return {name.removeprefix("ode/") for name in row if name.startswith("ode/")}
