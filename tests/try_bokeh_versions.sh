#!/usr/bin/env bash
# Run the tests of the pages with other versions of BokehJS than the installed one.
#
#   tests/try_bokeh_versions.sh                 the oldest that qvis supports, 3.6.3, and the newest
#   tests/try_bokeh_versions.sh 3.5.2 3.7       these versions
#   TESTS="tests/test_page_values.py -n 2" tests/try_bokeh_versions.sh
#   PYTHON=.venv/bin/python tests/try_bokeh_versions.sh
#
# Each wheel is unpacked into a folder of its own, which comes first on Python's path: qvis only reads the script in it,
# so that nothing of Bokeh's own dependencies is needed, and the environment stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
[ $# -gt 0 ] || set -- 3.4.0 3.6.3 newest

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

failed=()
for version in "$@"; do
    requirement=bokeh
    [ "$version" = newest ] || requirement=bokeh==$version
    "$python" -m pip install -qq --disable-pip-version-check --no-deps --target "$folder/$version" "$requirement"
    echo "== BokehJS $version"
    PYTHONPATH=$folder/$version${PYTHONPATH:+:$PYTHONPATH} \
        "$python" -m pytest -q ${TESTS:-tests/test_page_*.py tests/test_changes_page.py} || failed+=("$version")
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "The pages fail with BokehJS ${failed[*]}" >&2
    exit 1
fi
