# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`python -m vhu_legacy` is the `vhu-legacy` command."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="vhu-legacy")
