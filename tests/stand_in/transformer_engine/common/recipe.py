"""Names of FP8 recipes, without FP8."""


class DelayedScaling:
    pass


class Float8CurrentScaling:
    pass
