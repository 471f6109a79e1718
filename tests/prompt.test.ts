/** The client on a terminal: progress line, prompt, history, completion, Ctrl-C. The terminal is script(1)'s. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { splitWords } from "../terminal.ts";
import {
  HOME,
  loggedIn,
  makeRoot,
  randomBytes,
  spawnFedClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const hasScript = Bun.which("script") !== null;
if (!hasScript) console.log("skipped: the tests of the terminal need script(1), from bsdutils or util-linux");

/** The client on a pseudo-terminal of 80 columns. */
function onTerminal(server: string, args: string[], cwd: string, env: Record<string, string> = {}) {
  const command = ["stty cols 80;", process.execPath, join(HOME, "client.ts"), ...args].join(" ");
  const child = Bun.spawn(["script", "-qefc", command, "/dev/null"], {
    cwd,
    env: { ...process.env, REPRISE_SERVER: server, TERM: "xterm", SHELL: "/bin/sh", ...env },
    stdio: ["pipe", "pipe", "inherit"],
  });
  let screen = "";
  const reading = (async () => {
    for await (const bytes of child.stdout) screen += new TextDecoder().decode(bytes);
  })();
  return {
    screen: () => screen,
    type(text: string) {
      child.stdin.write(text);
      child.stdin.flush();
    },
    shows: (text: string) =>
      waitFor(`the screen shows ${text}, not ${JSON.stringify(screen)}`, () => screen.includes(text)),
    /** What is shown from now on. */
    clear() {
      screen = "";
    },
    async status() {
      const status = await child.exited;
      await reading;
      return status;
    },
  };
}

const files = { "photo.png": randomBytes(3_000_000), "my docs/read me.txt": "words\n", notes: "x" };

test.skipIf(!hasScript)("a download shows one line, redrawn, and a summary in its place", async () => {
  using root = makeRoot(files);
  await using server = await startServer(root.path, { args: ["--limit-rate", "3M"] });
  using folder = temporaryFolder();
  const terminal = onTerminal(server.address, ["get", "photo.png"], folder.path);
  expect(await terminal.status()).toBe(0);
  const lines = terminal.screen().split("\n");
  expect(lines.length).toBe(2);
  expect(Bun.stripANSI(lines[0]!)).toMatch(/\rphoto\.png {2}\d+ % {2}[\d.]+ MB {2}[\d.]+ MB\/s {2}0:0\d left\r/);
  expect(lines[0]).toMatch(/photo\.png {2}3\.0 MB in \d\.\d s, [\d.]+ MB\/s\r$/);
  for (const drawn of lines[0]!.split("\r")) expect(Bun.stringWidth(drawn)).toBeLessThan(80);
  const quiet = onTerminal(server.address, ["get", "notes", "-q"], folder.path);
  expect(await quiet.status()).toBe(0);
  expect(quiet.screen()).toBe("");
});

test.skipIf(!hasScript)(
  "the prompt completes names on the server, remembers lines, and goes on after an error",
  async () => {
    using root = makeRoot(files);
    await using server = await startServer(root.path);
    using folder = temporaryFolder();
    const terminal = onTerminal(server.address, [], folder.path);
    await terminal.shows("reprise:/> ");
    terminal.type("cd my\t");
    await terminal.shows("cd my\\ docs/");
    terminal.type("\r");
    await terminal.shows("reprise:/my docs> ");
    terminal.clear();
    terminal.type("get re\t");
    await terminal.shows("get read\\ me.txt ");
    terminal.type("\r");
    await waitFor("the file is there", () => Bun.file(join(folder.path, "client_root/read me.txt")).size === 6);
    terminal.type("stat nothing\r");
    await terminal.shows('not found: "my docs/nothing"');
    terminal.type("cd ..\r");
    terminal.clear();
    await terminal.shows("reprise:/> ");
    terminal.type("\x1b[A\x1b[A\x1b[A");
    await terminal.shows("get read\\ me.txt");
    terminal.clear();
    terminal.type("\x03");
    await terminal.shows("reprise:/> ");
    terminal.clear();
    terminal.type("q\t");
    await terminal.shows("quit ");
    terminal.type("\r");
    expect(await terminal.status()).toBe(0);
    expect(readFileSync(join(folder.path, "client_root/read me.txt"), "utf8")).toBe("words\n");
  },
);

test.skipIf(!hasScript)("Ctrl-C ends a transfer but not the prompt, and the next get goes on", async () => {
  using root = makeRoot(files);
  await using server = await startServer(root.path, { args: ["--limit-rate", "2M"] });
  using folder = temporaryFolder();
  const terminal = onTerminal(server.address, [], folder.path);
  await terminal.shows("reprise:/> ");
  terminal.type("get photo.png\r");
  await terminal.shows(" left");
  terminal.type("\x03");
  await terminal.shows("interrupted; the same command goes on from here");
  terminal.clear();
  terminal.type("resume\r");
  await terminal.shows(" left");
  for (const key of ["g", "\t", "e", "\t", "\x03"]) terminal.type(key);
  await terminal.shows("interrupted; the same command goes on from here");
  terminal.type("\x15resume\r");
  await terminal.shows("resumed at");
  terminal.type("\x04");
  expect(await terminal.status()).toBe(0);
  expect(readFileSync(join(folder.path, "client_root/photo.png")).equals(files["photo.png"])).toBe(true);
});

test.skipIf(!hasScript)("the prompt puts, moves, removes, makes folders and gets them", async () => {
  using root = makeRoot(files);
  await using server = await startServer(root.path, { args: ["--writable"] });
  using folder = makeRoot({ "up/a b": "1", "up/e/": "", one: "2" });
  const terminal = onTerminal(server.address, [], folder.path);
  await terminal.shows("reprise:/> ");
  const lines = [
    "mkdir -p made/deep",
    "cd made",
    "put one",
    "put -r up -t deep",
    "mv one two",
    "rm ../notes",
    "get -r deep",
  ];
  for (const line of lines) terminal.type(`${line}\r`);
  await terminal.shows("1 file, 1 B");
  terminal.type("rm deep\r");
  await terminal.shows("rm -r removes it");
  terminal.type("rm -r deep\r\x04");
  expect(await terminal.status()).toBe(0);
  expect(treeOf(root.path).map((line) => line.split(" ")[0]!)).toEqual(["made", "made/two", "my", "my", "photo.png"]);
  expect(treeOf(join(folder.path, "client_root/deep/up"))).toEqual(treeOf(join(folder.path, "up")));
});

test.skipIf(!hasScript)("Ctrl-C ends a folder's transfer but not the prompt, and the same line goes on", async () => {
  const tree = Object.fromEntries(Array.from({ length: 50 }, (_, index) => [`d/${index}`, `${index}`]));
  using root = makeRoot({ ...tree, "d/big": randomBytes(5_000_000) });
  await using server = await startServer(root.path, { args: ["--limit-rate", "1M", "--writable"] });
  using folder = temporaryFolder();
  const terminal = onTerminal(server.address, [], folder.path);
  await terminal.shows("reprise:/> ");
  terminal.type("get -r d\r");
  const log = join(folder.path, "client_root/d/big.resume.json");
  await waitFor("some of the large one has come", () => loggedIn(log) > 0);
  await terminal.shows("files");
  terminal.clear();
  terminal.type("\x03");
  await terminal.shows("interrupted; the same command goes on from here");
  await terminal.shows("reprise:/> ");
  expect(terminal.screen().match(/interrupted/g)!.length).toBe(1);
  terminal.type("get -r d\r");
  await waitFor("it is whole", () => existsSync(join(folder.path, "client_root/d/big")));
  terminal.type("\x04");
  expect(await terminal.status()).toBe(0);
  expect(treeOf(join(folder.path, "client_root"))).toEqual(treeOf(root.path));
  const last = await waitFor("the server logs it", () =>
    server.log.find(({ event, path, status }) => event === "get" && path === "d/big" && status === "ok"),
  );
  expect(last.offset).toBeGreaterThan(0);
});

test.skipIf(!hasScript)("a folder has one line, redrawn, and then a summary", async () => {
  using root = makeRoot({ "d/a": randomBytes(1_000_000), "d/b": randomBytes(1_000_000), "d/c": "3" });
  await using server = await startServer(root.path, { args: ["--limit-rate", "1M"] });
  using folder = temporaryFolder();
  const terminal = onTerminal(server.address, ["get", "-r", "d"], folder.path);
  expect(await terminal.status()).toBe(0);
  expect(Bun.stripANSI(terminal.screen())).toMatch(/\rd {2}\d of 3 files {2}[\d.]+ k?M?B {2}[\d.]+ k?M?B\/s/);
  const lines = terminal.screen().split("\n");
  expect(lines.length).toBe(2);
  for (const drawn of lines[0]!.split("\r")) expect(Bun.stringWidth(drawn)).toBeLessThan(80);
  expect(lines[0]).toEndWith("3 files, 2.0 MB; 0 unchanged\r");
});

const plain: [string, string[], Record<string, string>][] = [
  ["--no-progress", ["--no-progress"], {}],
  ["TERM=dumb", [], { TERM: "dumb" }],
];
test.skipIf(!hasScript).each(plain)("%s: no line is drawn, for a file or a folder", async (_, args, env) => {
  using root = makeRoot({ "d/a": randomBytes(500_000), no: "" });
  await using server = await startServer(root.path, { args: ["--limit-rate", "1M"] });
  using folder = temporaryFolder();
  const one = onTerminal(server.address, ["get", "d/a", ...args], folder.path, env);
  expect([await one.status(), one.screen()]).toEqual([0, ""]);
  const all = onTerminal(server.address, ["get", "-r", "d", ...args], folder.path, env);
  expect([await all.status(), all.screen()]).toEqual([0, "1 file, 500.0 kB; 0 unchanged\r\n"]);
});

test.skipIf(!hasScript)("NO_COLOR and TERM=dumb: an error has no colour, otherwise it has", async () => {
  using root = makeRoot({});
  await using server = await startServer(root.path);
  for (const [env, isColoured] of [
    [{}, true],
    [{ NO_COLOR: "1" }, false],
    [{ TERM: "dumb" }, false],
  ] as const) {
    const terminal = onTerminal(server.address, ["get", "no"], root.path, { NO_COLOR: "", ...env });
    expect(await terminal.status()).toBe(3);
    expect(terminal.screen().includes("\x1b[31m")).toBe(isColoured);
  }
});

test("a script goes on where the server has closed the idle connection, and a failure is still one", async () => {
  using root = makeRoot({ "d/": "" });
  await using server = await startServer(root.path, { args: ["--writable", "--idle-timeout", "3"] });
  using folder = temporaryFolder();
  const child = spawnFedClient(server.address, ["-d", folder.path]);
  const errors = new Response(child.stderr).text();
  child.stdin.write("stat d\n");
  child.stdin.flush();
  await waitFor("the answer has come", () => server.log.some(({ event }) => event === "stat"));
  await waitFor("the server has closed", () => server.log.some(({ status }) => status === "idle"));
  child.stdin.write("mkdir d\n");
  child.stdin.end();
  expect(await child.exited).toBe(4);
  expect(await errors).toContain('"d" exists already');
});

test("splitWords() splits as a shell does", () => {
  expect(splitWords(" get  a\\ b 'c \"d' \"e 'f\" g\\\"h ''")).toEqual(["get", "a b", 'c "d', "e 'f", 'g"h', ""]);
  expect(() => splitWords("get 'a")).toThrow("a quote is not closed");
});
