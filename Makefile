# make demo   set up, then compress the embedded model: the main job, on a fresh machine
# make test   set up, then lint, type check and run all tests
# make clean  remove what these made; make distclean also the environment

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.set-up
# What the installation compiles; when it changes, it is installed again.
NATIVE := CMakeLists.txt $(shell find plugins/onnxruntime -type f)
# uv looks for local wheels where pip was told to.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: demo test clean distclean

demo: $(STAMP)
	rm -rf demo-out
	$(BIN)/lsp-deploy demo --copy-only -o demo-out
	cd demo-out && PATH="$(CURDIR)/$(BIN):$$PATH" lsp-deploy compress digits_vit.onnx --target a100

test: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	scripts/typecheck.sh
	$(BIN)/pytest -n auto

$(STAMP): pyproject.toml requirements-dev.txt scripts/set_up.sh $(NATIVE)
	PYTHON="$(PYTHON)" scripts/set_up.sh
	touch $@

clean:
	rm -rf demo-out build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
