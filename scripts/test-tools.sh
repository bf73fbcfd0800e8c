#!/usr/bin/env bash
# What the tests ask for a second opinion: programs that read our files, speak to our server, or that we speak to.
#
#   scripts/test-tools.sh FOLDER
#
# Python packages go into FOLDER, with FOLDER/python to run them, and touch no other Python. Servers and a browser are packages of
# the system: they are installed where CI is set (as root, with apt-get), and named elsewhere. Whatever is missing at the end,
# the tests that want it say that they skip; so nothing here is a reason to stop.
set -uo pipefail
folder=$1

# The light ones. Tests against torch, transformers, peft, gguf and llama-cpp-python (2 GB) run when CASHTAG_TEST_PYTHON names a
# Python that has them.
PACKAGES=(duckdb==2.0.1 polars==2.1.0 pandas==3.1.1 pyarrow openai==3.57.0 tensorboard==2.21.0)

if [[ "$(cat "$folder/.packages" 2>/dev/null)" != "${PACKAGES[*]}" ]]; then
	echo "python3 -m pip install --target $folder/site ${PACKAGES[*]}"
	rm -rf "$folder/site"
	if PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: \
		--target "$folder/site" "${PACKAGES[@]}"; then
		printf '#!/bin/sh\nPYTHONPATH=%q${PYTHONPATH:+:$PYTHONPATH} exec python3 "$@"\n' "$(realpath "$folder/site")" >"$folder/python"
		chmod +x "$folder/python"
		echo "${PACKAGES[*]}" >"$folder/.packages"
	else
		echo 'no Python packages: tests that read our files with other tools will skip'
	fi
fi

missing=()
command -v nats-server >/dev/null || missing+=(nats-server)
ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v postgres >/dev/null || missing+=(postgresql)
[[ -n "${CHROMIUM:-}" ]] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null ||
	command -v google-chrome >/dev/null || missing+=(chromium)
if ((${#missing[@]})); then
	if [[ -n "${CI:-}" && $EUID == 0 ]] && command -v apt-get >/dev/null; then
		echo "apt-get install ${missing[*]}"
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
			>/dev/null 2>"$folder/apt.log" || tail -3 "$folder/apt.log"
	else
		echo "not installed, so their tests will skip: ${missing[*]} (apt install ${missing[*]})"
	fi
fi
exit 0
