/** The client on a terminal: progress line, prompt, history, completion, Ctrl-C. The terminal is script(1)'s. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { splitWords } from "../terminal.ts";
import { HOME, makeRoot, randomBytes, startServer, TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const hasScript = Bun.which("script") !== null;
if (!hasScript) console.log("skipped: the tests of the terminal need script(1), from bsdutils or util-linux");

/** The client on a pseudo-terminal of 80 columns. */
function onTerminal(server: string, args: string[], cwd: string) {
  const command = ["stty cols 80;", process.execPath, join(HOME, "client.ts"), ...args].join(" ");
  const child = Bun.spawn(["script", "-qefc", command, "/dev/null"], {
    cwd,
    env: { ...process.env, REPRISE_SERVER: server, TERM: "xterm", SHELL: "/bin/sh" },
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

test("splitWords() splits as a shell does", () => {
  expect(splitWords(" get  a\\ b 'c \"d' \"e 'f\" g\\\"h ''")).toEqual(["get", "a b", 'c "d', "e 'f", 'g"h', ""]);
  expect(() => splitWords("get 'a")).toThrow("a quote is not closed");
});
