/** Completion in real shells: what is typed, with Tab, and the words that the command then gets. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { main as client } from "../client.ts";
import type { Command } from "../command.ts";
import { completionScript, declaredCommands } from "../completion.ts";
import { makeRoot, runClient, startServer, TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const SHELLS = ["bash", "zsh", "fish"] as const;
type Shell = (typeof SHELLS)[number];

const missing = [...SHELLS, "script"].filter((tool) => Bun.which(tool) === null);
if (missing.length > 0) console.log(`skipped: the tests of completion that need ${missing.join(", ")}`);
const lacks = (...tools: string[]) => tools.some((tool) => missing.includes(tool));

/** Every kind of word, option and value; the descriptions have what a shell might obey. */
const main: Command = {
  meta: { name: "client.ts", description: 'It\'s [all]: "$HOME" `id` \\ %d' },
  args: { server: { type: "string", description: 'It\'s [a]: "$HOME" `id` \\ %d' } },
  subCommands: {
    get: {
      meta: { name: "get", description: 'It\'s [got]: "$HOME" `id` \\ %d' },
      args: {
        "path…": { type: "positional", description: "Files on the server" },
        server: { type: "string", description: "Server" },
        directory: { type: "string", alias: "d", valueHint: "dir", description: "Folder" },
        output: { type: "string", alias: "o", valueHint: "file", description: "Name" },
        quiet: { type: "boolean", alias: "q", description: "Say nothing" },
      },
    },
    put: {
      meta: { name: "put", description: "Put" },
      args: {
        "file…": { type: "positional", description: "Files" },
        to: { type: "string", alias: "t", description: "Folder on the server" },
      },
    },
    sync: {
      meta: { name: "sync", description: "Sync" },
      args: {
        remote: { type: "positional", description: "Folder on the server" },
        local: { type: "positional", description: "Folder here" },
      },
    },
    choose: {
      meta: { name: "choose", description: "Choose" },
      args: { which: { type: "positional", valueHint: "red|green", description: "Colour" } },
    },
    secret: { meta: { name: "secret", hidden: true } },
  },
};

/** What is on the server, by the letter that each begins with. */
const NAMES = {
  a: "a space.txt",
  b: "bé ü — 日本.txt",
  c: "c'quote.txt",
  d: 'd"quote.txt',
  e: "e$HOME.txt",
  f: "f\\back\\\\slash.txt",
  g: "g*[x]?.txt",
  h: "h`id`$(id).txt",
  i: "i;ls&|(x)<y>.txt",
  j: "j{a,b}.txt",
  k: "k:colon=equal@at:b.txt",
  l: "l~tilde!bang#hash%d^x,y+z.txt",
  m: "m  two blanks.txt",
  "\\~": "~n.txt",
  "\\#": "#o.txt",
};
const FOLDER = "p's dir/inner $dir/";
const files = { ...NAMES, one: "q one.txt", two: "q two.txt", bell: "q\x07bell", inner: `${FOLDER}file one.txt` };

/** Typed, with \t for Tab, and the words that arrive. A folder's last slash is the shell's own affair. */
const TYPED: Record<string, string[]> = {
  ...Object.fromEntries(Object.entries(NAMES).map(([prefix, name]) => [`get ${prefix}\t`, ["get", name]])),
  "get a\\ sp\t": ["get", NAMES.a],
  "get 'a sp\t": ["get", NAMES.a],
  'get "a sp\t': ["get", NAMES.a],
  'get "e\t': ["get", NAMES.e],
  'get "d\t': ["get", NAMES.d],
  'get "f\t': ["get", NAMES.f],
  'get "h\t': ["get", NAMES.h],
  'get "l\t': ["get", NAMES.l],
  "get 'c\t": ["get", NAMES.c],
  "get 'l\t": ["get", NAMES.l],
  "get 'f\t": ["get", NAMES.f],
  "get bé\\ ü\t": ["get", NAMES.b],
  "get k:co\t": ["get", NAMES.k],
  "get k:colon=eq\t": ["get", NAMES.k],
  "get k:colon=equal@at:\t": ["get", NAMES.k],
  "get p\t\tfi\t": ["get", `${FOLDER}file one.txt`],
  "get p\\'s\\ dir/in\t": ["get", FOLDER.slice(0, -1)],
  "get q\ttw\t": ["get", files.two],
  "get a\tk\t": ["get", NAMES.a, NAMES.k],
  "get -q a\t": ["get", "-q", NAMES.a],
  "get --qu\ta\t": ["get", "--quiet", NAMES.a],
  "get -d x a\t": ["get", "-d", "x", NAMES.a],
  "get -qd x a\t": ["get", "-qd", "x", NAMES.a],
  "get -d lo\t": ["get", "-d", "local dir"],
  "get --directory=lo\t": ["get", "--directory=local dir"],
  "get -o he\t": ["get", "-o", "here file.txt"],
  "get --output=he\t": ["get", "--output=here file.txt"],
  "get -- a\t": ["get", "--", NAMES.a],
  "ge\ta\t": ["get", NAMES.a],
  "--ser\t x": ["--server", "x"],
  "put he\t": ["put", "here file.txt"],
  "put x -t a\t": ["put", "x", "-t", NAMES.a],
  "put x --to=a\t": ["put", "x", `--to=${NAMES.a}`],
  "sync a\the\t": ["sync", NAMES.a, "here file.txt"],
  "sync a b c\t": ["sync", "a", "b", "c"],
  "choose gr\t": ["choose", "green"],
  "sec\t": ["sec"],
};

/** A folder to sit in, with files of its own, the script, and a \`reprise\` that writes down its words. */
function makeHome(shell: Shell) {
  const home = temporaryFolder();
  mkdirSync(join(home.path, "local dir"));
  writeFileSync(join(home.path, "here file.txt"), "");
  const script = completionScript(shell, main);
  writeFileSync(join(home.path, "script"), script);
  const note = `printf '%s\\0' ARGUMENTS >.words.new; mv .words.new .words`;
  const posix = `reprise() { ${note.replace("ARGUMENTS", '"$@"')}; }\nPS1='ready> '\n`;
  writeFileSync(join(home.path, ".bashrc"), `${posix}source ./script\n`);
  writeFileSync(join(home.path, ".zshrc"), `${posix}source ./script\n`);
  mkdirSync(join(home.path, ".config/fish"), { recursive: true });
  const fish = `function reprise; ${note.replace("ARGUMENTS", "$argv")}; end\nfunction fish_prompt; echo 'ready> '; end\n`;
  writeFileSync(join(home.path, ".config/fish/config.fish"), `${fish}source ./script\n`);
  return home;
}

const START = { bash: "bash --rcfile .bashrc -i", zsh: "zsh -d -i", fish: "fish -i" };

/** The shell on a pseudo-terminal, in `home`. */
function startShell(shell: Shell, home: string, server: string) {
  const env = {
    ...process.env,
    HOME: home,
    ZDOTDIR: home,
    INPUTRC: "/dev/null",
    XDG_CONFIG_HOME: join(home, ".config"),
  };
  const child = Bun.spawn(["script", "-qefc", `stty cols 200; ${START[shell]}`, "/dev/null"], {
    cwd: home,
    env: { ...env, REPRISE_SERVER: server, TERM: "xterm", LC_ALL: "C.UTF-8", SHELL: "/bin/sh" },
    stdio: ["pipe", "pipe", "inherit"],
  });
  let screen = "";
  (async () => {
    for await (const bytes of child.stdout) screen += new TextDecoder().decode(bytes);
  })();
  const type = (text: string) => {
    child.stdin.write(text);
    child.stdin.flush();
  };
  const noted = join(home, ".words");
  return {
    /** The words that \`reprise\` gets when this is typed behind it, and \`before\` it. */
    async words(text: string, before = ""): Promise<string[]> {
      await waitFor(`a prompt, not ${JSON.stringify(screen)}`, () => screen.includes("ready> "));
      screen = "";
      type(`${before}reprise ${text}\r`);
      await waitFor(`${shell} runs ${JSON.stringify(text)}: ${screen}`, () => existsSync(noted));
      const words = readFileSync(noted, "utf8").split("\0").slice(0, -1);
      rmSync(noted);
      return words.map((word) => word.replace(/\/$/, ""));
    },
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await child.exited;
    },
  };
}

/** What bash would show for this line: the function is called as bash calls it. */
async function offeredByBash(home: string, server: string, line: string): Promise<string[]> {
  const word = /\S*$/.exec(line)![0];
  const call = `source ./script; compopt() { [[ $* == '-o default' || $* == '-o dirnames' ]] && echo "$*"; }
    COMP_LINE=$1 COMP_POINT=\${#1}
    _reprise reprise "$2"; printf '%s\n' "\${COMPREPLY[@]}"`;
  return output(["bash", "-c", call, "bash", line, word], home, server);
}

async function offeredByFish(home: string, server: string, line: string): Promise<string[]> {
  const lines = await output(
    ["fish", "--no-config", "-c", "source ./script; complete -C $argv[1]", line],
    home,
    server,
  );
  return lines.map((text) => text.replace(/\t.*/, ""));
}

async function output(cmd: string[], cwd: string, server: string): Promise<string[]> {
  const env = { ...process.env, HOME: cwd, REPRISE_SERVER: server, LC_ALL: "C.UTF-8" };
  const child = Bun.spawn(cmd, { cwd, env, stdio: ["ignore", "pipe", "pipe"] });
  const [text, errors] = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
  expect(errors).toBe("");
  return text.split("\n").filter((name) => name !== "");
}

const OFFERED = { bash: offeredByBash, fish: offeredByFish };
const NOWHERE = "127.0.0.1:1";
const makeServedRoot = () => makeRoot(Object.fromEntries(Object.values(files).map((name) => [name, "x"])));

for (const shell of SHELLS) {
  test.skipIf(lacks(shell, "script"))(`${shell} completes commands, options, and names here and there`, async () => {
    using root = makeServedRoot();
    await using server = await startServer(root.path);
    using home = makeHome(shell);
    await using terminal = startShell(shell, home.path, server.address);
    const got: Record<string, string[]> = {};
    for (const typed of Object.keys(TYPED)) got[typed] = await terminal.words(typed);
    expect(got).toEqual(TYPED);
  });

  test.skipIf(lacks(shell, "script"))(`${shell} asks the server that the line names`, async () => {
    using root = makeServedRoot();
    await using server = await startServer(root.path);
    using home = makeHome(shell);
    await using terminal = startShell(shell, home.path, NOWHERE);
    const { address } = server;
    expect(await terminal.words("get a\t")).toEqual(["get", "a"]);
    expect(await terminal.words(`get --server ${address} a\t`)).toEqual(["get", "--server", address, NAMES.a]);
    expect(await terminal.words(`get --server=${address} a\t`)).toEqual(["get", `--server=${address}`, NAMES.a]);
    expect(await terminal.words(`--server '${address}' get a\t`)).toEqual(["--server", address, "get", NAMES.a]);
    // Bash does not show its functions what stands before the command.
    const before = await terminal.words("get a\t", `REPRISE_SERVER=${address} `);
    expect(before).toEqual(["get", shell === "bash" ? "a" : NAMES.a]);
  });

  test.skipIf(lacks(shell))(`${shell} finds no fault in its script`, async () => {
    for (const script of [completionScript(shell, main), completionScript(shell, client)]) {
      const child = Bun.spawn([shell, "-n"], { stdin: new Blob([script]), stdout: "pipe", stderr: "pipe" });
      expect(await new Response(child.stderr).text()).toBe("");
      expect(await child.exited).toBe(0);
    }
  });
}

for (const shell of ["bash", "fish"] as const) {
  test.skipIf(lacks(shell))(`${shell} offers what is declared, and nothing where nothing can be known`, async () => {
    using root = makeRoot({ "one.txt": "x", "one/two": "x", three: "x" });
    await using server = await startServer(root.path);
    using home = makeHome(shell);
    const offered = async (line: string, address = server.address) =>
      (await OFFERED[shell](home.path, address, `reprise ${line}`)).toSorted();
    expect(await offered("")).toEqual(["choose", "get", "put", "sync"]);
    expect(await offered("get --")).toEqual(["--directory", "--help", "--output", "--quiet", "--server"]);
    expect(await offered("put --")).toEqual(["--help", "--to"]);
    expect(await offered("get o")).toEqual(["one.txt", "one/"]);
    expect(await offered("get one/")).toEqual(["one/two"]);
    expect(await offered("get -d x o")).toEqual(["one.txt", "one/"]);
    expect(await offered("get three o")).toEqual(["one.txt", "one/"]);
    expect(await offered("choose ")).toEqual(["green", "red"]);
    expect(await offered("choose red ")).toEqual([]);
    expect(await offered("get --server ")).toEqual([]);
    expect(await offered("nothing ")).toEqual([]);
    expect(await offered("get ", NOWHERE)).toEqual([]);
    expect(await offered("get --server '' ")).toEqual([]);
  });
}

test.skipIf(lacks("bash"))("bash leaves files here to readline", async () => {
  using home = makeHome("bash");
  const offered = (line: string) => offeredByBash(home.path, NOWHERE, `reprise ${line}`);
  for (const line of ["put ", "put a b", "sync a ", "get -o ", "get --output=h"]) {
    expect(await offered(line)).toEqual(["-o default"]);
  }
  expect(await offered("get -d ")).toEqual(["-o dirnames"]);
});

test("complete prints names, a folder with its slash, and is not listed", async () => {
  using root = makeRoot({ "é 1": "x", "f/g h": "x", "bell\x07": "x", "-dash": "x" });
  await using server = await startServer(root.path);
  const complete = async (...words: string[]) => {
    const { status, output, errors } = await runClient(server.address, ["complete", ...words]);
    expect([status, errors]).toEqual([0, ""]);
    return output;
  };
  expect(await complete()).toBe("-dash\nf/\né 1\n");
  expect(await complete("--", "")).toBe("-dash\nf/\né 1\n");
  expect(await complete("--", "-d")).toBe("-dash\nf/\né 1\n");
  expect(await complete("--", "f/x")).toBe("f/g h\n");
  for (const word of ["/", "/f/", "../", "nothing/", "é 1/", "f//"]) expect(await complete("--", word)).toBe("");
  for (const address of [NOWHERE, "", "not an address", "nowhere.invalid:1"]) {
    expect(await complete(`--server=${address}`, "--", "f/")).toBe("");
  }
  expect((await runClient(server.address, ["--help"])).output).not.toMatch(/\bcomplete\b/);
  expect((await runClient(server.address, ["complet"])).errors).not.toContain("did you mean");
});

test("complete gives up on a server that says nothing, long before a command would", async () => {
  using silent = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const address = `127.0.0.1:${silent.port}`;
  const started = performance.now();
  const { status, output, errors } = await runClient(`${address},${address},${address}`, ["complete", "--", "a"]);
  expect([status, output, errors]).toEqual([0, "", ""]);
  expect(performance.now() - started).toBeLessThan(15_000);
});

test("completion prints the script for a shell that is known", async () => {
  const { status, output } = await runClient(NOWHERE, ["completion", "bash"]);
  expect(status).toBe(0);
  expect(output).toBe(`${completionScript("bash", client)}\n`);
  for (const shell of ["tcsh", "toString"]) {
    const refused = await runClient(NOWHERE, ["completion", shell]);
    expect([refused.status, refused.output]).toEqual([2, ""]);
    expect(refused.errors).toContain(`completion is made for bash, zsh, fish, not "${shell}"`);
  }
});

test("the words of each command are what its declaration says", () => {
  const known: Record<string, string[]> = {
    "": [],
    get: ["remote"],
    cat: ["remote"],
    ls: ["remote"],
    stat: ["remote"],
    put: ["local"],
    rm: ["remote"],
    mv: ["remote"],
    mkdir: ["remote"],
    sync: ["remote", "local"],
    resume: [],
    status: [],
    completion: ["bash|zsh|fish"],
  };
  const commands = declaredCommands(client);
  for (const { name, words } of commands) expect({ name, words }).toEqual({ name, words: known[name] as never });
  const get = commands.find(({ name }) => name === "get")!;
  expect(get.isOpen).toBe(true);
  const values = Object.fromEntries(get.options.map(({ flags, value }) => [flags.at(-1)!, value]));
  expect(values).toMatchObject({ "--directory": "folder", "--output": "local", "--server": "nothing" });
  expect(values["--quiet"]).toBeUndefined();
});
