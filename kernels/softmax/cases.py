from kernels.contract import Case, Tolerance

CASES: tuple[Case, ...] = ()
PROPERTIES = ()
TOLERANCES = {("chunked", "float32"): Tolerance(1e-5, "x")}
