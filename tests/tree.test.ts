/** Folders: there and back, interrupted, compared, and in the hands of servers and disks that do what they should not. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import {
  EntriesEncoder,
  type Entry,
  encodeEnd,
  encodeError,
  encodeMeta,
  type Meta,
  RepriseError,
  type Request,
} from "../protocol.ts";
import { startProxy } from "./faults/proxy.ts";
import {
  type Answering,
  contentFrames,
  type Files,
  HOME,
  isAlive,
  killHard,
  killWorkers,
  type LogLine,
  makeRoot,
  namesBelow,
  peakResidentBytes,
  randomBytes,
  readResumeLog,
  runClient,
  type Server,
  sizeOf,
  spawnClient,
  startFakeServer,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
  writeTree,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const KIB = 1024;
const MIB = 1024 * KIB;

/** In memory, where that can be had: what a disk takes for tens of thousands of files is not what is tested. */
const IN_MEMORY = existsSync("/dev/shm") ? "/dev/shm" : undefined;

/** A writable server on a root with these files, and an empty folder for the client. */
async function setUp(files: Files = {}, args: string[] = [], parent?: string) {
  const root = makeRoot(files, parent);
  const folder = temporaryFolder(parent);
  const server = await startServer(root.path, { args: ["--writable", ...args] });
  const place = {
    root: root.path,
    folder: folder.path,
    server,
    remote: (name: string) => join(root.path, name),
    local: (name: string) => join(folder.path, name),
    run: (...args: string[]) => runClient(place.server.address, args, { cwd: folder.path }),
    spawn: (...args: string[]) => spawnClient(place.server.address, args, { cwd: folder.path }),
    async [Symbol.asyncDispose]() {
      await place.server[Symbol.asyncDispose]();
      root[Symbol.dispose]();
      folder[Symbol.dispose]();
    },
  };
  return place;
}
type Place = Awaited<ReturnType<typeof setUp>>;

/** Runs the client against a server of its own on the same root, and returns with all that this server has logged. */
async function logged(it: Place, args: string[]) {
  // On the port of the one before: to the client's logs it is the same server.
  const { port } = it.server;
  if (it.server.process.exitCode === null) await it.server.stop("SIGINT");
  const server = await startServer(it.root, { port, args: ["--writable"] });
  it.server = server;
  const run = await runClient(server.address, args, { cwd: it.folder });
  await server.stop("SIGTERM");
  it.server = await startServer(it.root, { port, args: ["--writable"] });
  return { ...run, log: server.log };
}

const contentOf = (log: LogLine[]) => log.filter(({ event }) => event === "get" || event === "put");
const pathsOf = (log: LogLine[]) => contentOf(log).map(({ path }) => path!);
const lines = (text: string) => text.split("\n").filter((line) => line !== "");

/** Names that only a transfer under way may have, wherever they are; a server's own folder must at least be empty. */
function temporaries(folder: string): string[] {
  return namesBelow(folder).filter((name) => /\.part|\.resume\.json|\.reprise-|^\.reprise\/(?!lock$)/.test(name));
}

const filesIn = (folder: string) => readdirSync(folder).filter((name) => !name.startsWith(".reprise"));

const small = (count: number, folder = "") =>
  Object.fromEntries(Array.from({ length: count }, (_, index) => [`${folder}f${index}`, `content ${index}\n`]));

// ---------------------------------------------------------------------------------------------------- whole trees

const ODD_NAMES = [
  "with space",
  " leading and trailing ",
  "\u00e9 composed",
  "e\u0301 composed",
  "-r",
  "--delete",
  'it\'s "quoted"',
  "back\\slash\\",
  "*.png",
  "[a]{b,c}?",
  "~",
  "$HOME",
  "semi;colon&amp",
  "tab\there",
  "\u202egnp.exe",
  "日本語",
  "🙂",
  "..x",
  "x..",
  ".hidden",
  "x".repeat(255),
  "é".repeat(127),
];

const oddTree: Files = {
  ...Object.fromEntries(ODD_NAMES.map((name, index) => [`names/${name}`, `content ${index}`])),
  ...Object.fromEntries(ODD_NAMES.map((name, index) => [`folders/${name}/inside`, `inside ${index}`])),
  "empty/": "",
  "a/b/c/d/e/f/g/": "",
  "a/b/c/x": "x",
  "sizes/0": "",
  "sizes/1": "1",
  "sizes/-1": randomBytes(512 * KIB - 1, 2),
  "sizes/+0": randomBytes(512 * KIB, 3),
  "sizes/+1": randomBytes(512 * KIB + 1, 4),
  "sizes/20M": randomBytes(20 * MIB, 5),
};

describe("get -r and put -r", () => {
  test.each(["1", "2", "8"])(
    "a tree of odd names and sizes goes up and comes down the same (--jobs %s)",
    async (jobs) => {
      await using it = await setUp();
      writeTree(it.local("odd"), oddTree);
      utimesSync(it.local("odd/sizes/0"), 1_000_000_000.123456, 1_000_000_000.123456);
      utimesSync(it.local("odd/sizes/20M"), -1.5, -1.5);
      const tree = treeOf(it.local("odd"));
      expect(await it.run("put", "-r", "odd", "--jobs", jobs)).toMatchObject({ status: 0, output: "", errors: "" });
      expect(treeOf(it.remote("odd"))).toEqual(tree);
      expect(await it.run("get", "-r", "odd", "-d", "back", "--jobs", jobs)).toMatchObject({
        status: 0,
        output: "",
        errors: "",
      });
      expect(treeOf(it.local("back/odd"))).toEqual(tree);
      expect(readdirSync(it.folder).sort()).toEqual(["back", "odd"]);
      expect([...temporaries(it.root), ...temporaries(it.folder)]).toEqual([]);
      for (const args of [
        ["put", "-r", "odd"],
        ["get", "-r", "odd", "-d", "back"],
        ["sync", "odd", "back/odd"],
      ]) {
        const again = await logged(it, args);
        expect([again.status, pathsOf(again.log)]).toEqual([0, []]);
      }
    },
  );

  test("10,000 files in a folder: all there, and the second run sends nothing", async () => {
    await using it = await setUp({}, [], IN_MEMORY);
    writeTree(it.local("many"), small(10_000));
    const tree = treeOf(it.local("many"));
    expect(await it.run("put", "-r", "many")).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.remote("many"))).toEqual(tree);
    expect(await it.run("get", "-r", "many")).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.local("client_root/many"))).toEqual(tree);
    for (const args of [
      ["sync", "many", "client_root/many"],
      ["sync", "--up", "many", "many"],
    ]) {
      const again = await logged(it, args);
      expect(again).toMatchObject({ status: 0, errors: "0 files, 0 B; 10000 unchanged\n" });
      expect(contentOf(again.log)).toEqual([]);
    }
  });

  test("names that cannot travel are refused, each in its own line, and the others go on", async () => {
    await using it = await setUp();
    writeTree(it.local("d"), { "new\nline": "1", "cr\rname": "2", fine: "3", "fold\ner/": "", "z/fine": "4" });
    Bun.spawnSync(["bash", "-c", `printf 5 > "$1/d/"$'not utf8 \\xff'`, "bash", it.folder]);
    const run = await it.run("put", "-r", "d");
    expect(lines(run.errors).length).toBe(4);
    expect(run.status).not.toBe(0);
    for (const name of ['"d/new\\nline"', '"d/cr\\rname"', '"d/fold\\ner"', "not utf8"])
      expect(run.errors).toContain(name);
    expect(treeOf(it.remote("d")).map((line) => line.split(" ")[0]!)).toEqual(["fine", "z", "z/fine"]);
  });

  test("-o gives a folder another name, -t as well, / is everything, and several come together", async () => {
    await using it = await setUp({ "d/sub/x": "1", "d/y": "2", "e/": "", z: "3" });
    const everything = treeOf(it.root);
    expect(await it.run("get", "-r", "d", "-o", "new/name")).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.local("new/name"))).toEqual(treeOf(it.remote("d")));
    expect(await it.run("get", "-r", "/", "-d", "all")).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.local("all"))).toEqual(everything);
    expect(await it.run("get", "-r", "d", "z", "e", "d/sub/x", "-d", "some")).toMatchObject({ status: 0, errors: "" });
    expect(readdirSync(it.local("some")).sort()).toEqual(["d", "e", "x", "z"]);
    expect(treeOf(it.local("some/d"))).toEqual(treeOf(it.remote("d")));
    expect(await it.run("put", "-r", "all/d", "-t", "made/here")).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.remote("made/here"))).toEqual(treeOf(it.remote("d")));
    expect(await it.run("put", "-r", "all/d", "all/z", "-t", "e")).toMatchObject({ status: 0, errors: "" });
    expect(readdirSync(it.remote("e")).sort()).toEqual(["d", "z"]);
    expect(await it.run("put", "-r", "all/.", "-t", "e")).toMatchObject({ status: 0, errors: "" });
    expect(readdirSync(it.remote("e")).sort()).toEqual(["d", "e", "z"]);
  });

  test("-r is allowed for a single file, which then goes where it would without", async () => {
    await using it = await setUp({ z: "3" });
    expect(await it.run("get", "-r", "z", "-o", "here/q")).toMatchObject({ status: 0, errors: "" });
    expect(readFileSync(it.local("here/q"), "utf8")).toBe("3");
    expect(await it.run("put", "-r", "here/q", "-t", "w")).toMatchObject({ status: 0, errors: "" });
    expect(readFileSync(it.remote("w"), "utf8")).toBe("3");
  });

  test("empty folders arrive, also as the whole of it", async () => {
    await using it = await setUp({ "e/": "" });
    expect(await it.run("get", "-r", "e", "-o", "empty")).toMatchObject({ status: 0, errors: "" });
    expect(readdirSync(it.local("empty"))).toEqual([]);
    expect(await it.run("sync", "e", "synced", "-q")).toMatchObject({ status: 0, errors: "" });
    expect(readdirSync(it.local("synced"))).toEqual([]);
    expect(await it.run("put", "-r", "empty", "-t", "up")).toMatchObject({ status: 0, errors: "" });
    expect(readdirSync(it.remote("up"))).toEqual([]);
  });

  test("a folder without -r is refused with status 4 and told about, what else is named goes on", async () => {
    await using it = await setUp({ "d/x": "1", z: "3" });
    writeTree(it.folder, { "l/x": "1", f: "2" });
    expect(await it.run("get", "d", "z")).toMatchObject({
      status: 4,
      errors: 'error: not a file: "d" is a folder; -r takes all that is in it\n',
    });
    expect(readdirSync(it.local("client_root"))).toEqual(["z"]);
    expect(await it.run("put", "l", "f")).toMatchObject({
      status: 4,
      errors: 'error: not a file: "l" is a folder; -r takes all that is in it\n',
    });
    expect(existsSync(it.remote("l"))).toBe(false);
    expect(readFileSync(it.remote("f"), "utf8")).toBe("2");
    for (const args of [
      ["get", "d"],
      ["put", "l"],
    ]) {
      const run = await it.run(...args);
      expect([run.errors, lines(run.errors).length]).toEqual([expect.stringContaining("-r"), 1]);
      expect(run.status).not.toBe(0);
    }
  });

  test("links, devices and unfinished transfers are left out, which is said", async () => {
    await using it = await setUp();
    writeTree(it.local("d"), { x: "1", "y.part": "2", "y.resume.json": "{}", ".reprise/z": "3", "sub/w": "4" });
    symlinkSync("/etc/passwd", it.local("d/link"));
    symlinkSync("sub", it.local("d/folder-link"));
    Bun.spawnSync(["mkfifo", it.local("d/pipe")]);
    expect(await it.run("put", "-r", "d")).toMatchObject({
      status: 0,
      errors: "warn: 6 links, devices and unfinished transfers were left out\n",
    });
    expect(treeOf(it.remote("d")).map((line) => line.split(" ")[0]!)).toEqual(["sub", "sub/w", "x"]);
    symlinkSync("/etc/passwd", it.remote("d/link"));
    Bun.spawnSync(["mkfifo", it.remote("d/pipe")]);
    expect((await it.run("get", "-r", "d")).status).toBe(0);
    expect(readdirSync(it.local("client_root/d")).sort()).toEqual(["sub", "x"]);
  });

  test("--no-clobber leaves what is there, and puts the rest", async () => {
    await using it = await setUp({ "d/x": "theirs" });
    writeTree(it.local("d"), { x: "mine", y: "new" });
    expect((await it.run("put", "-r", "-n", "d")).status).toBe(0);
    expect(readFileSync(it.remote("d/x"), "utf8")).toBe("theirs");
    expect(readFileSync(it.remote("d/y"), "utf8")).toBe("new");
  });

  test("-q says nothing, also of what is left out; a failure is still said", async () => {
    await using it = await setUp();
    writeTree(it.local("d"), { x: "1" });
    symlinkSync("x", it.local("d/link"));
    for (const args of [
      ["put", "-r", "d"],
      ["get", "-r", "d"],
      ["sync", "d", "e"],
      ["sync", "--up", "d", "d"],
    ]) {
      expect(await it.run(...args, "-q")).toMatchObject({ status: 0, output: "", errors: "" });
    }
    expect(await it.run("get", "-r", "no", "-q")).toMatchObject({ status: 3, errors: 'error: not found: "no"\n' });
  });

  test("20,000 files of 100 bytes take little memory on either side", async () => {
    await using it = await setUp({}, [], IN_MEMORY);
    const content = "x".repeat(100);
    for (let folder = 0; folder < 20; folder++) {
      mkdirSync(it.local(`d/${folder}`), { recursive: true });
      for (let file = 0; file < 1000; file++) writeFileSync(it.local(`d/${folder}/${file}`), content);
    }
    for (const args of [
      ["put", "-r", "d"],
      ["get", "-r", "d"],
    ]) {
      const child = it.spawn(...args);
      const peak = await peakResidentBytes(child.pid);
      expect(await child.exited).toBe(0);
      expect(peak).toBeLessThan(120e6);
    }
    const peaks = it.server
      .workers()
      .map((pid) => Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) * 1024);
    expect(peaks.length).toBe(2);
    expect(Math.max(...peaks)).toBeLessThan(120e6);
    expect(treeOf(it.local("client_root/d"))).toEqual(treeOf(it.local("d")));
  });
});

// ---------------------------------------------------------------------------------------------------- interrupted

const bigTree: Files = {
  ...small(150, "a/"),
  ...small(150, "b/c/"),
  "b/big one": randomBytes(6 * MIB, 11),
  "z/big two": randomBytes(6 * MIB, 12),
};
/** Of which the last is on its way for a while, at such a rate. */
const smallTree: Files = { ...small(50, "a/"), "z/big": randomBytes(2 * MIB, 13) };
/** So slow that no stop of a busy machine is long enough to miss that a large file is on its way. */
const SLOW = ["--limit-rate", "1M"];

const logsIn = (folder: string) =>
  namesBelow(folder)
    .filter((name) => name.endsWith(".resume.json"))
    .flatMap((name) => readResumeLog(join(folder, name)) ?? []);

describe("interrupted in the middle and run again", () => {
  test.each([
    ["SIGINT", 130],
    ["SIGTERM", 143],
    ["SIGKILL", 137],
  ] as const)("get -r by %s: only what is missing comes, large files from where they were", async (signal, status) => {
    await using it = await setUp(bigTree, SLOW);
    const child = it.spawn("get", "-r", "/", "-d", "t");
    await waitFor("a large file is on its way", () => logsIn(it.local("t")).some(({ bytes }) => bytes > MIB));
    child.kill(signal);
    expect(await child.exited).toBe(status);
    const errors = await new Response(child.stderr).text();
    if (signal === "SIGINT") expect(errors).toBe("error: interrupted; the same command goes on from here\n");
    const held = new Map(logsIn(it.local("t")).map(({ path, bytes }) => [path, bytes]));
    const there = Object.keys(bigTree).filter((path) => existsSync(it.local(`t/${path}`)));
    if (signal !== "SIGKILL") expect(readdirSync(it.local("t")).filter((name) => name.startsWith("."))).toEqual([]);
    const again = await logged(it, ["get", "-r", "/", "-d", "t"]);
    expect(again).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.local("t"))).toEqual(treeOf(it.root));
    expect(temporaries(it.local("t"))).toEqual([]);
    expect(pathsOf(again.log).sort()).toEqual(
      Object.keys(bigTree)
        .filter((path) => !there.includes(path))
        .sort(),
    );
    expect(held.size).toBeGreaterThan(0);
    for (const { path, offset } of contentOf(again.log)) expect([path, offset]).toEqual([path, held.get(path!) ?? 0]);
  });

  test.each([
    ["SIGINT", 130],
    ["SIGKILL", 137],
  ] as const)("put -r by %s: only what is missing goes, large files from where they were", async (signal, status) => {
    await using it = await setUp({}, SLOW);
    writeTree(it.local("t"), bigTree);
    const child = it.spawn("put", "-r", "t");
    // What the client has sent may still be on its way.
    const staged = () => namesBelow(it.remote(".reprise")).map((name) => sizeOf(it.remote(`.reprise/${name}`)));
    await waitFor("much of a large file has come", () => Math.max(0, ...staged()) > 2 * MIB);
    child.kill(signal);
    expect(await child.exited).toBe(status);
    // What was on the way is taken or given up before the server is asked again.
    await it.server.stop("SIGINT");
    const there = Object.keys(bigTree).filter((path) => existsSync(it.remote(`t/${path}`)));
    const again = await logged(it, ["put", "-r", "t"]);
    expect(again).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.remote("t"))).toEqual(treeOf(it.local("t")));
    expect([...temporaries(it.root), ...temporaries(it.folder)]).toEqual([]);
    const missing = Object.keys(bigTree).filter((path) => !there.includes(path));
    expect(pathsOf(again.log).sort()).toEqual(missing.map((path) => `t/${path}`).sort());
    const resumed = contentOf(again.log).filter(({ offset }) => offset! > 0);
    expect(resumed.length).toBeGreaterThan(0);
  });

  test.each([
    ["SIGINT", 130],
    ["SIGKILL", 137],
  ] as const)("put -r -t NAME by %s: the same command goes on as that name, not into it", async (signal, status) => {
    await using it = await setUp({}, SLOW);
    writeTree(it.local("t"), smallTree);
    const child = it.spawn("put", "-r", "t", "-t", "new");
    await waitFor("some of it is there", () => existsSync(it.remote("new/a")));
    child.kill(signal);
    expect(await child.exited).toBe(status);
    const again = await it.run("put", "-r", "t", "-t", "new");
    expect([again.status, again.errors]).toEqual([0, "going on with t as new\n"]);
    expect(treeOf(it.remote("new"))).toEqual(treeOf(it.local("t")));
    expect(readdirSync(it.local("client_root"))).toEqual([]);
    // Done, it is a folder as any other.
    expect(await it.run("put", "-r", "t", "-t", "new")).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.remote("new/t"))).toEqual(treeOf(it.local("t")));
  });

  test("put -r -t NAME/ puts into that folder also where a put -r -t NAME was interrupted", async () => {
    await using it = await setUp({}, SLOW);
    writeTree(it.local("t"), smallTree);
    const child = it.spawn("put", "-r", "t", "-t", "new");
    await waitFor("some of it is there", () => existsSync(it.remote("new/a")));
    child.kill("SIGKILL");
    await child.exited;
    expect(await it.run("put", "-r", "t", "-t", "new/")).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(it.remote("new/t"))).toEqual(treeOf(it.local("t")));
  });

  test("put -r -t NAME of the folder where its log is does not put the log", async () => {
    await using it = await setUp({});
    writeTree(it.local("client_root"), { f: "1", "g.put-r.json": "2" });
    const { status, errors } = await it.run("put", "-r", "client_root", "-t", "new");
    expect([status, errors]).toEqual([0, "warn: 1 links, devices and unfinished transfers were left out\n"]);
    expect(readdirSync(it.remote("new")).sort()).toEqual(["f", "g.put-r.json"]);
    expect(readdirSync(it.local("client_root")).sort()).toEqual(["f", "g.put-r.json"]);
  });

  test("put -r -t NAME of the folder where that for the logs is made does not put that", async () => {
    await using it = await setUp({});
    writeTree(it.local("a"), { f: "1" });
    const { status, errors } = await it.run("put", "-r", ".", "-t", "new");
    expect([status, errors]).toEqual([0, ""]);
    expect(readdirSync(it.remote("new"))).toEqual(["a"]);
    expect(readdirSync(it.folder).includes("client_root")).toBe(false);
  });

  test("put -r -t NAME that the server refuses as a whole leaves no log, and one without room for a log says so", async () => {
    await using it = await setUp({});
    writeTree(it.local("t"), { f: "1" });
    await using readOnly = await startServer(it.root);
    const run = (address: string, ...args: string[]) =>
      runClient(address, ["put", "-r", "t", "-t", ...args], { cwd: it.folder });
    expect(await run(readOnly.address, "new")).toMatchObject({ status: 4 });
    expect(readdirSync(it.folder)).toEqual(["t"]);
    const done = await run(it.server.address, "new", "-d", it.local("t/f"));
    expect(done.status).toBe(0);
    expect(done.errors).toContain("no log can be kept");
    expect(treeOf(it.remote("new"))).toEqual(treeOf(it.local("t")));
  });

  test("a worker killed in the middle: get -r and put -r go on by themselves", async () => {
    await using it = await setUp(bigTree, SLOW);
    const down = it.spawn("get", "-r", "/", "-d", "t");
    for (let killed = 0; killed < 2; killed++) {
      await waitFor("a large file is on its way", () =>
        logsIn(it.local("t")).some(({ bytes }) => bytes > (killed + 1) * MIB),
      );
      await killWorkers(it.server);
    }
    expect(await down.exited).toBe(0);
    expect(await new Response(down.stderr).text()).toContain("trying again");
    expect(treeOf(it.local("t"))).toEqual(treeOf(it.root));
    const up = it.spawn("put", "-r", "t", "-d", "logs");
    await waitFor("a large file is on its way", () => logsIn(it.local("logs")).some(({ bytes }) => bytes > MIB));
    await killWorkers(it.server);
    expect(await up.exited).toBe(0);
    expect(treeOf(it.remote("t"))).toEqual(treeOf(it.local("t")));
    await waitFor("the server has tidied up", () => temporaries(it.root).length === 0);
    expect(temporaries(it.folder)).toEqual([]);
  });

  test("the whole server killed and started again on its port: goes on", async () => {
    await using it = await setUp(bigTree, SLOW);
    const child = it.spawn("get", "-r", "/", "-d", "t");
    await waitFor("a large file is on its way", () => logsIn(it.local("t")).some(({ bytes }) => bytes > MIB));
    const workers = it.server.workers();
    await it.server.stop("SIGKILL");
    await waitFor("its workers are gone", () => workers.every((pid) => !isAlive(pid)));
    await using _ = await startServer(it.root, { port: it.server.port, args: ["--writable"] });
    expect(await child.exited).toBe(0);
    expect(treeOf(it.local("t"))).toEqual(treeOf(it.root));
  });

  test("a list that is cut in the middle is asked for again", async () => {
    const entries = Array.from({ length: 50 }, (_, index) => file(`f${index}`, "1"));
    let lists = 0;
    using server = startFakeServer(
      serving({ ...Object.fromEntries(entries.map(({ path }) => [path, "1"])) }, () => {
        lists++;
        if (lists > 1) return [...listOf(entries)];
        return [listOf(entries.slice(0, 20))[0], undefined];
      }),
    );
    using folder = temporaryFolder();
    const run = await runClient(server.address, ["get", "-r", "/", "-d", folder.path]);
    expect([run.status, lists]).toEqual([0, 2]);
    expect(readdirSync(folder.path).length).toBe(50);
  });

  // Of which much has come, or nothing yet but what it is.
  test.each([4 * MIB, 10_000])(
    "a large file that was begun and cut at %d is a small one now: the new content, and nothing of the old",
    async (cutAt) => {
      await using it = await setUp({ "d/big": randomBytes(6 * MIB), "d/x": "1" });
      let isCutting = true;
      const spoil = () => (isCutting ? { toClient: { cutAt } } : {});
      using proxy = startProxy({ target: it.server.port, spoil });
      const get = (...args: string[]) => runClient(proxy.address, ["get", "-r", "d", "-o", it.local("d"), ...args]);
      expect((await get("--jobs", "1", "--retries", "0")).status).toBe(8);
      expect(existsSync(it.local("d/big.part"))).toBe(true);
      isCutting = false;
      writeFileSync(it.remote("d/big"), "small now");
      expect((await get()).status).toBe(0);
      expect(treeOf(it.local("d"))).toEqual(treeOf(it.remote("d")));
    },
  );
});

// ---------------------------------------------------------------------------------------------------- servers of ours

const file = (path: string, content: string): Entry => ({ path, kind: "file", size: content.length, mtime: 1e15 });
const metaOf = (content: string, kind: "file" | "folder" = "file"): Meta => ({
  kind,
  size: kind === "file" ? content.length : 0,
  mtime: 1e15,
  etag: kind === "file" ? "e" : "",
});

function listOf(entries: Entry[]): Uint8Array[] {
  const encoder = new EntriesEncoder();
  const frames = entries.flatMap((entry) => encoder.add(entry) ?? []);
  const rest = encoder.rest();
  return [...frames, ...(rest ? [rest] : []), encodeEnd(entries.length)];
}

/** A server with these files, whatever their names, whose list is whatever it is told to be. */
function serving(files: Record<string, string>, list: () => (Uint8Array | undefined)[]): Answering {
  return (request: Request) => {
    if (request.action === "list") return list();
    const path = "path" in request ? request.path : "";
    if (request.action === "stat")
      return [encodeMeta(metaOf(files[path] ?? "", path !== "" && path in files ? "file" : "folder"))];
    const content = files[path];
    if (request.action !== "get" || content === undefined) return [encodeError(new RepriseError("not_found"))];
    const { offset } = request;
    return [encodeMeta(metaOf(content), offset), ...contentFrames(content.slice(offset))];
  };
}

describe("a hostile server", () => {
  const large = "L".repeat(600 * KIB);
  const names = [
    "../outside",
    "../../outside",
    "/outside",
    "d/../../outside",
    "./x",
    "d//x",
    "..",
    ".",
    "",
    "nul\0name",
    ".reprise/x",
    ".reprise-1-abcdef/x",
    "d/.reprise/x",
    "x.part",
    "x.resume.json",
    "x.resume.json/x",
    "x.part/x",
    "y".repeat(256),
  ];
  const cases: [string, string, string][] = [
    ...names.map((name): [string, string, string] => [name, "large", large]),
    ...["../outside", "", ".reprise/x", "x.part/x"].map((name): [string, string, string] => [name, "small", "S"]),
  ];

  test.each(cases)("that lists %p (%s): nothing of it is written, and it fails", async (name, _, content) => {
    using around = temporaryFolder();
    const folder = join(around.path, "in/folder");
    const entries = [file("good", "good"), file(name, content), file("after", "after")];
    using server = startFakeServer(serving({ good: "good", after: "after", [name]: content }, () => listOf(entries)));
    const run = await runClient(server.address, ["get", "-r", "/", "-d", folder, "--retries", "0"]);
    expect(run.status).not.toBe(0);
    expect(lines(run.errors).length).toBe(1);
    const left = treeOf(around.path).map((line) => line.split(" ")[0]!);
    expect(left.filter((path) => !["in", "in/folder", "in/folder/good", "in/folder/after"].includes(path))).toEqual([]);
    expect(readdirSync(around.path)).toEqual(["in"]);
    expect(readFileSync(join(folder, "good"), "utf8")).toBe("good");
  });

  test("that matches a pattern with a name that leads out", async () => {
    for (const content of ["S", large]) {
      using around = temporaryFolder();
      const folder = join(around.path, "in");
      const answer = serving({ "a/../x": content, "../x": content }, () =>
        listOf([{ ...file("a/..", ""), kind: "folder" }, file("x", content)]),
      );
      using server = startFakeServer(answer);
      const run = await runClient(server.address, ["get", "-r", "**", "-d", folder, "--retries", "0"]);
      expect(existsSync(join(around.path, "x"))).toBe(false);
      expect(run.status).not.toBe(0);
    }
  });

  test("that lists a file twice gives one file, or an error", async () => {
    for (const content of ["S", large]) {
      using folder = temporaryFolder();
      using server = startFakeServer(serving({ x: content }, () => listOf([file("x", content), file("x", content)])));
      const run = await runClient(server.address, ["get", "-r", "/", "-d", folder.path, "--retries", "0"]);
      expect([0, 7]).toContain(run.status);
      expect(readFileSync(join(folder.path, "x"), "utf8") === content).toBe(true);
      expect(readdirSync(folder.path)).toEqual(["x"]);
    }
  });

  test("whose file is a folder when it is asked for", async () => {
    using folder = temporaryFolder();
    const entries = [file("x", "1"), file("y", "2")];
    const honest = serving({ y: "2" }, () => listOf(entries));
    using server = startFakeServer((request, connection) =>
      request.action === "get" && request.path === "x"
        ? [encodeMeta(metaOf("", "folder")), encodeEnd(0)]
        : honest(request, connection),
    );
    const run = await runClient(server.address, ["get", "-r", "/", "-d", folder.path, "--retries", "0"]);
    expect(run.status).not.toBe(0);
    expect(existsSync(join(folder.path, "x"))).toBe(false);
  });

  test("whose file has more or less content than it announced", async () => {
    for (const [announced, sent] of [
      ["12", "123"],
      ["123", "12"],
      [large, `${large}1`],
      [`${large}1`, large],
    ]) {
      using folder = temporaryFolder();
      using server = startFakeServer((request, connection) =>
        request.action === "get"
          ? [encodeMeta(metaOf(announced!), request.offset), ...contentFrames(sent!.slice(request.offset))]
          : serving({}, () => listOf([file("x", announced!)]))(request, connection),
      );
      const run = await runClient(server.address, ["get", "-r", "/", "-d", folder.path, "--retries", "0"]);
      expect([run.status, existsSync(join(folder.path, "x"))]).toEqual([expect.any(Number), false]);
      expect(run.status).not.toBe(0);
      expect(lines(run.errors).length).toBe(1);
    }
  });

  test("whose file is larger than it was when it was listed: the file as it is now", async () => {
    using folder = temporaryFolder();
    using server = startFakeServer(serving({ x: large, y: "22" }, () => listOf([file("x", "1"), file("y", "1")])));
    expect(await runClient(server.address, ["get", "-r", "/", "-d", folder.path])).toMatchObject({
      status: 0,
      errors: "",
    });
    expect(readFileSync(join(folder.path, "x"), "utf8") === large).toBe(true);
    expect(readFileSync(join(folder.path, "y"), "utf8")).toBe("22");
  });

  test("that answers for another offset than was asked for: never a mixture", async () => {
    using folder = temporaryFolder();
    let cut = true;
    const content = "0123456789abcdef".repeat(64 * KIB);
    using server = startFakeServer((request, connection) => {
      if (request.action !== "get") return serving({}, () => listOf([file("x", content)]))(request, connection);
      const whole = [encodeMeta(metaOf(content)), ...contentFrames(content)];
      if (!cut) return whole;
      cut = false;
      return [...whole.slice(0, 3), undefined];
    });
    const run = await runClient(server.address, ["get", "-r", "/", "-d", folder.path, "--retries", "1"]);
    const path = join(folder.path, "x");
    if (existsSync(path)) expect(readFileSync(path, "utf8") === content).toBe(true);
    else expect(run.status).not.toBe(0);
  });
});

// ---------------------------------------------------------------------------------------------------- in the way

describe("something in the way", () => {
  test("a local folder that is a link leading out is not gone through", async () => {
    await using it = await setUp({
      "d/small": "1",
      "d/large": randomBytes(600 * KIB),
      "d/deep/large": randomBytes(600 * KIB),
      x: "2",
    });
    mkdirSync(it.local("outside"));
    mkdirSync(it.local("t"));
    symlinkSync("../outside", it.local("t/d"));
    for (const args of [
      ["get", "-r", "/", "-d", "t"],
      ["sync", "/", "t"],
    ]) {
      const run = await it.run(...args);
      expect(run.status).toBe(7);
      expect(run.errors).toContain("in the way: it is not a folder");
      expect(run.errors).not.toContain("internal error");
      expect(readdirSync(it.local("outside"))).toEqual([]);
      expect(readFileSync(it.local("t/x"), "utf8")).toBe("2");
    }
  });

  test("a local folder swapped for a link while it is filled: nothing arrives outside", async () => {
    await using it = await setUp({ ...small(200, "d/"), "d/large": randomBytes(6 * MIB), x: "2" }, [
      "--limit-rate",
      "1M",
    ]);
    mkdirSync(it.local("outside"));
    const child = it.spawn("get", "-r", "/", "-d", "t", "--jobs", "1");
    await waitFor("the large one has begun", () => logsIn(it.local("t")).some(({ bytes }) => bytes > MIB));
    renameSync(it.local("t/d"), it.local("t/was"));
    symlinkSync("../outside", it.local("t/d"));
    expect(await child.exited).toBe(7);
    // The log of what was on its way then is all that the link leads out.
    expect(readdirSync(it.local("outside")).filter((name) => name !== "large.resume.json")).toEqual([]);
  });

  test("a local file where a folder is to be, and the other way round: each has its line, the others come", async () => {
    await using it = await setUp({ "d/x": "1", "d/y": "2", "d/e/z": "3", f: "4", g: "5" });
    writeTree(it.local("t"), { d: "a file", "f/inside": "6" });
    const run = await it.run("get", "-r", "/", "-d", "t");
    expect(run.status).toBe(7);
    expect(run.errors).not.toContain("internal error");
    expect(run.errors).toContain('"t/d" is in the way: it is not a folder');
    expect(run.errors).toContain('"t/f" is in the way: it is not a file');
    expect(readFileSync(it.local("t/g"), "utf8")).toBe("5");
    expect(readFileSync(it.local("t/d"), "utf8")).toBe("a file");
    expect(temporaries(it.folder)).toEqual([]);
  });

  test("the same on the server", async () => {
    await using it = await setUp({ "t/d": "a file", "t/f/inside": "6" });
    writeTree(it.local("t"), { "d/x": "1", "d/e/z": "3", f: "4", g: "5" });
    const run = await it.run("put", "-r", "t");
    expect(run.status).toBe(4);
    expect(run.errors).toContain('"t/d" is in the way on the server: it is not a folder');
    expect(run.errors).toContain('"t/f" is in the way on the server: it is not a file');
    expect(readFileSync(it.remote("t/g"), "utf8")).toBe("5");
    expect(readFileSync(it.remote("t/d"), "utf8")).toBe("a file");
  });

  test("put -r to where a file is, and without --writable: refused, and said once for each", async () => {
    await using it = await setUp({ f: "4" });
    writeTree(it.local("t"), { x: "1" });
    const run = await it.run("put", "-r", "t", "-t", "f");
    expect(run.status).toBe(4);
    expect(readFileSync(it.remote("f"), "utf8")).toBe("4");
    await using readOnly = await startServer(it.root);
    const refused = await runClient(readOnly.address, ["put", "-r", "t"], { cwd: it.folder });
    expect(refused.status).toBe(4);
    expect(refused.errors).toContain("--writable");
  });

  test("large files that are refused while they are sent: said for each, and no bug of ours", async () => {
    using folder = makeRoot({ "t/a": randomBytes(20 * MIB), "t/b": randomBytes(20 * MIB), "t/c": "small" });
    using root = makeRoot({ "t/": "" });
    await using readOnly = await startServer(root.path);
    const run = await runClient(readOnly.address, ["put", "-r", "t"], { cwd: folder.path });
    expect(run.status).toBe(4);
    expect(lines(run.errors).length).toBe(3);
    for (const line of lines(run.errors)) expect(line).toContain("refused: the server is read-only");
  });

  test("a path that is too long here keeps nothing else from coming", async () => {
    const deep = Array.from({ length: 16 }, (_, index) => String.fromCharCode(97 + index).repeat(250)).join("/");
    const shortened = deep.slice(0, 4000);
    using server = startFakeServer(
      serving({ [shortened]: "1", x: "2" }, () => listOf([file(shortened, "1"), file("x", "2")])),
    );
    using folder = temporaryFolder();
    const local = join(folder.path, "n".repeat(120));
    const run = await runClient(server.address, ["get", "-r", "/", "-d", local]);
    // What is small is written from folder to folder, for which no path is too long.
    expect([0, 7]).toContain(run.status);
    expect(run.errors).not.toContain("internal error");
    expect(readFileSync(join(local, "x"), "utf8")).toBe("2");
  });

  const isRoot = process.getuid?.() === 0;
  test.skipIf(!isRoot || !Bun.which("setpriv"))(
    "a local folder that cannot be read, or written: its own line, status 7",
    async () => {
      await using it = await setUp({ "d/x": "1" });
      writeTree(it.local("t"), { "closed/x": "1", "open/y": "2" });
      chmodSync(it.local("t/closed"), 0);
      for (const path of ["", "t", "t/open"]) chmodSync(it.local(path), 0o755);
      const asNobody = (...args: string[]) => {
        const client = [process.execPath, join(HOME, "client.ts"), ...args];
        const { stderr, exitCode } = Bun.spawnSync(
          ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", ...client],
          {
            cwd: it.folder,
            env: { ...process.env, REPRISE_SERVER: it.server.address, HOME: it.folder },
          },
        );
        return { status: exitCode, errors: stderr.toString() };
      };
      const up = asNobody("put", "-r", "t");
      expect(up).toMatchObject({ status: 7, errors: 'error: cannot read "t/closed": no permission\n' });
      expect(readFileSync(it.remote("t/open/y"), "utf8")).toBe("2");
      const upAndDelete = asNobody("sync", "--up", "--delete", "d", "t");
      expect(upAndDelete.status).toBe(7);
      expect(existsSync(it.remote("d/x"))).toBe(true);
      const down = asNobody("get", "-r", "d", "-d", "t");
      expect(down).toMatchObject({ status: 7, errors: expect.stringContaining("no permission") });
      chownSync(it.local("t"), 65534, 65534);
      rmSync(it.local("t/open"), { recursive: true });
      const downAndDelete = asNobody("sync", "--delete", "d", "t");
      expect(downAndDelete.status).toBe(7);
    },
  );

  test("a file that vanishes or grows while a folder is sent has its own line, and the others go on", async () => {
    await using it = await setUp();
    writeTree(it.local("t"), { "0-large": randomBytes(3 * MIB), ...small(20, "1/"), "2/large": randomBytes(MIB) });
    const child = it.spawn("put", "-r", "t", "--jobs", "1", "--limit-rate", "512K");
    await waitFor("the first is on its way", () => logsIn(it.local("client_root")).some(({ bytes }) => bytes > MIB));
    const waiting = treeOf(it.local("t")).length;
    rmSync(it.local("t/1/f3"));
    rmSync(it.local("t/2/large"));
    writeFileSync(it.local("t/1/f4"), "x".repeat(600 * KIB));
    const [status, errors] = [await child.exited, await new Response(child.stderr).text()];
    // Which of them had been sent by then is up to the order of the folder.
    const sent = ["1/f3", "1/f4", "2/large"].filter((path) => existsSync(it.remote(`t/${path}`)));
    expect(status).toBe(sent.length === 3 ? 0 : 7);
    expect(lines(errors).length).toBe(3 - sent.length);
    expect(treeOf(it.remote("t")).length).toBe(waiting - (3 - sent.length) - (existsSync(it.remote("t/2")) ? 0 : 1));
    expect(temporaries(it.root)).toEqual([]);
  });

  test("--json that nobody can take: the run fails, and no file has another's content", async () => {
    const contents = Object.fromEntries(
      Array.from({ length: 20 }, (_, index) => [`f${index}`, `content of f${index}`]),
    );
    const entries = Object.entries(contents).map(([path, content]) => file(path, content));
    using folder = temporaryFolder();
    let gets = 0;
    let isOver = false;
    const answer = serving(contents, () => listOf(entries));
    using server = startFakeServer(async (request, connection) => {
      // One by one, so that each is written, and told of, before the next comes.
      const before = request.action === "get" ? gets++ : 0;
      await waitFor("the ones before it are there", () => isOver || filesIn(folder.path).length >= before);
      return answer(request, connection);
    });
    const args = ["get", "-r", "/", "-o", folder.path, "--json", "--jobs", "1", "--retries", "0"];
    const run = await runClient(server.address, args, { runBy: ["sh", "-c", 'exec "$0" "$@" > /dev/full'] });
    isOver = true;
    expect(run.status).toBe(7);
    const wrong = filesIn(folder.path).filter(
      (name) => readFileSync(join(folder.path, name), "utf8") !== contents[name],
    );
    expect(wrong).toEqual([]);
  });

  test("a file that does not stop changing on the server: given up after --retries, and the others come", async () => {
    // More than the kernel holds on its way: as it comes by, the server has not read all of it.
    await using it = await setUp({ "d/log": randomBytes(32 * MIB), "d/x": "1" });
    using proxy = startProxy({
      target: it.server.port,
      toClient(bytes, at) {
        if (at > MIB) appendFileSync(it.remote("d/log"), "x");
        return bytes;
      },
    });
    const run = await runClient(proxy.address, ["get", "-r", "d", "--retries", "2"], { cwd: it.folder });
    expect(run.status).toBe(5);
    expect(run.errors).toContain("again and again; get it when it is at rest");
    expect(readFileSync(it.local("client_root/d/x"), "utf8")).toBe("1");
  });
});

describe("a full disk", () => {
  const tmpfs = (path: string, size: string) =>
    Bun.spawnSync(["mount", "-t", "tmpfs", "-o", `size=${size}`, "reprise", path]).exitCode === 0;

  test("in the middle of get -r: every failing file has its line, and it goes on when there is room", async () => {
    await using it = await setUp({
      ...small(50, "a/"),
      ...Object.fromEntries(Array.from({ length: 12 }, (_, index) => [`b/${index}`, randomBytes(300 * KIB, index)])),
      "c/large": randomBytes(3 * MIB),
    });
    mkdirSync(it.local("t"));
    if (!tmpfs(it.local("t"), "2m")) return console.log("skipped: a small tmpfs cannot be mounted here");
    try {
      const run = await it.run("get", "-r", "/", "-d", "t");
      expect(run.status).toBe(7);
      const missing = treeOf(it.root).filter(
        (line) => line.includes(" file ") && !existsSync(it.local(`t/${line.split(" ")[0]}`)),
      );
      expect(missing.length).toBeGreaterThan(0);
      for (const line of missing) expect(run.errors).toContain(`t/${line.split(" ")[0]}"`);
      expect(lines(run.errors).length).toBe(missing.length);
      expect(run.errors).toContain("the disk is full");
      expect(temporaries(it.local("t")).filter((name) => name.startsWith("."))).toEqual([]);
      Bun.spawnSync(["mount", "-o", "remount,size=20m", it.local("t")]);
      expect(await it.run("get", "-r", "/", "-d", "t")).toMatchObject({ status: 0, errors: "" });
      expect(treeOf(it.local("t"))).toEqual(treeOf(it.root));
    } finally {
      Bun.spawnSync(["umount", "-l", it.local("t")]);
    }
  });

  test("on the server in the middle of put -r: status 9, nothing half, and it goes on when there is room", async () => {
    using root = temporaryFolder();
    using folder = temporaryFolder();
    if (!tmpfs(root.path, "2m")) return console.log("skipped: a small tmpfs cannot be mounted here");
    try {
      await using server = await startServer(root.path, { args: ["--writable", "--keep-free", "0"] });
      writeTree(join(folder.path, "t"), {
        ...small(50, "a/"),
        ...Object.fromEntries(Array.from({ length: 12 }, (_, index) => [`b/${index}`, randomBytes(300 * KIB, index)])),
        "c/large": randomBytes(3 * MIB),
      });
      const run = await runClient(server.address, ["put", "-r", "t"], { cwd: folder.path });
      expect(run.status).toBe(9);
      expect(run.errors).toContain("no room on the server");
      const wanted = treeOf(join(folder.path, "t"));
      expect(treeOf(join(root.path, "t")).filter((line) => !wanted.includes(line))).toEqual([]);
      Bun.spawnSync(["mount", "-o", "remount,size=20m", root.path]);
      expect(await runClient(server.address, ["put", "-r", "t"], { cwd: folder.path })).toMatchObject({
        status: 0,
        errors: "",
      });
      expect(treeOf(join(root.path, "t"))).toEqual(wanted);
    } finally {
      Bun.spawnSync(["umount", "-l", root.path]);
    }
  });
});

// ---------------------------------------------------------------------------------------------------- sync

const source: Files = {
  "same/x": "1",
  "same/y": "2",
  "new/z": "3",
  "new/empty/": "",
  changed: "theirs now",
  "file-here": "f",
  "folder-here/in": "g",
};
const other: Files = {
  "same/x": "1",
  "same/y": "2",
  changed: "old",
  "file-here/in/deep": "h",
  "folder-here": "i",
  "gone/with/all": "j",
  extra: "k",
};

/** Down: the server's folder is the source. Up: the local one is. */
const directions = [
  ["down", [], "get"],
  ["up", ["--up"], "put"],
] as const;

describe.each(directions)("sync %s", (direction, flags, verb) => {
  const isDown = direction === "down";

  async function setSync(from: Files = source, to: Files = other) {
    const it = await setUp();
    const [a, b] = isDown ? [it.remote("r"), it.local("l")] : [it.local("l"), it.remote("r")];
    mkdirSync(a);
    mkdirSync(b);
    writeTree(a, from);
    writeTree(b, to);
    const sync = (...args: string[]) => it.run("sync", ...flags, "r", "l", ...args);
    return Object.assign(it, {
      from: a,
      to: b,
      sync,
      logged: (...args: string[]) => logged(it, ["sync", ...flags, "r", "l", ...args]),
    });
  }

  /** The same name, size and time on both sides. */
  function alike(it: { from: string; to: string }, ...names: string[]): void {
    for (const name of names) for (const folder of [it.from, it.to]) utimesSync(join(folder, name), 1e9, 1e9);
  }

  test("sends what differs in size or time, and says how much it was", async () => {
    await using it = await setSync(source, { "same/x": "1", "same/y": "2", changed: "old", extra: "k" });
    alike(it, "same/x", "same/y");
    const run = await it.logged();
    expect(run).toMatchObject({ status: 0, output: "", errors: "4 files, 13 B; 2 unchanged\n" });
    expect(pathsOf(run.log).sort()).toEqual(["r/changed", "r/file-here", "r/folder-here/in", "r/new/z"]);
    expect(readFileSync(join(it.to, "extra"), "utf8")).toBe("k");
    rmSync(join(it.to, "extra"));
    expect(treeOf(it.to)).toEqual(treeOf(it.from));
    utimesSync(join(it.from, "same/x"), 1e9 + 1, 1e9 + 1);
    expect(pathsOf((await it.logged()).log)).toEqual(["r/same/x"]);
    expect(treeOf(it.to)).toEqual(treeOf(it.from));
    expect(await it.sync("-q")).toMatchObject({ status: 0, output: "", errors: "" });
  });

  test("--checksum finds other content of the same size and time, and sends nothing for the same content of another time", async () => {
    await using it = await setSync({ a: "1", b: "2", c: "3" }, { a: "1", b: "X", c: "3" });
    alike(it, "a", "b");
    utimesSync(join(it.to, "c"), 5e8, 5e8);
    const plain = await it.logged("--dry-run");
    expect(plain.output).toBe(`${verb} r/c\n`);
    const run = await it.logged("--checksum");
    expect([run.status, pathsOf(run.log)]).toEqual([0, ["r/b"]]);
    expect(readFileSync(join(it.to, "b"), "utf8")).toBe("2");
  });

  test("--delete removes what the source does not have, whatever kind it is", async () => {
    await using it = await setSync();
    alike(it, "same/x", "same/y");
    const run = await it.sync("--delete");
    expect(run).toMatchObject({ status: 0, errors: "4 files, 13 B; 2 unchanged, 4 removed\n" });
    expect(treeOf(it.to)).toEqual(treeOf(it.from));
    expect([...temporaries(it.root), ...temporaries(it.folder)]).toEqual([]);
  });

  test("--dry-run changes nothing and says what would be done, --json for programs", async () => {
    await using it = await setSync();
    alike(it, "same/x", "same/y");
    const before = [treeOf(it.root), treeOf(it.folder)];
    const run = await it.logged("--dry-run", "--delete");
    expect(run).toMatchObject({ status: 0, errors: "" });
    expect([treeOf(it.root), treeOf(it.folder)]).toEqual(before);
    expect(readdirSync(it.folder).sort()).toEqual(["l"]);
    expect(contentOf(run.log)).toEqual([]);
    const side = isDown ? "l" : "r";
    const wanted = [
      ...["changed", "file-here", "folder-here/in", "new/z"].map((path) => `${verb} r/${path}`),
      ...["folder-here", "new", "new/empty"].map((path) => `mkdir ${side}/${path}`),
      ...["extra", "file-here", "folder-here", "gone"].map((path) => `delete ${side}/${path}`),
    ];
    expect(lines(run.output).sort()).toEqual(wanted.sort());
    const json = lines((await it.sync("--dry-run", "--delete", "--json")).output);
    expect(
      json
        .map((line) => JSON.parse(line))
        .map(({ action, path }) => `${action} ${path}`)
        .sort(),
    ).toEqual(wanted);
    for (const line of json) expect(line).toMatch(/^\{"action":"(get|put|mkdir|delete)","path":"[^"]+","size":\d+\}$/);
    expect(json).toContain(`{"action":"${verb}","path":"r/changed","size":10}`);
    await it.sync("--delete", "-q");
    expect(await it.sync("--dry-run", "--delete")).toMatchObject({ status: 0, output: "", errors: "" });
  });

  test("--delete with nothing there refuses to remove everything, unless --force", async () => {
    await using it = await setSync({ "only/": "" }, other);
    rmSync(join(it.from, "only"), { recursive: true });
    const before = treeOf(it.to);
    for (const more of [[], ["--dry-run"]]) {
      const run = await it.sync("--delete", ...more);
      expect(run.status).toBe(2);
      expect(run.errors).toContain("--force");
      expect(treeOf(it.to)).toEqual(before);
    }
    expect((await it.sync("--delete", "--force")).status).toBe(0);
    expect(treeOf(it.to)).toEqual([]);
    writeTree(it.to, other);
    rmSync(it.from, { recursive: true });
    for (const more of [[], ["--force"]]) {
      const run = await it.sync("--delete", ...more);
      expect(run.status).not.toBe(0);
      expect(treeOf(it.to).length).toBe(before.length);
    }
  });

  test("a failure in the middle: nothing is removed", async () => {
    await using it = await setSync({ ...small(5), "sub/x": "1" }, { extra: "k", "old/y": "2" });
    if (isDown) symlinkSync("/nowhere", join(it.to, "f3"));
    else writeFileSync(join(it.from, "bad\nname"), "");
    const run = await it.sync();
    expect(run.status).not.toBe(0);
    if (!isDown) {
      expect((await it.sync("--delete")).status).not.toBe(0);
      expect(existsSync(join(it.to, "extra")) && existsSync(join(it.to, "old/y"))).toBe(true);
    }
    expect(existsSync(join(it.to, "sub/x"))).toBe(true);
  });

  test("what is not a folder is refused, and nothing is done", async () => {
    await using it = await setSync({ x: "1" }, { y: "2" });
    const [remote, local] = isDown ? ["r/x", "new"] : ["r2", "l/x"];
    const run = await it.run("sync", ...flags, remote, local);
    expect(run.status).not.toBe(0);
    expect(lines(run.errors).length).toBe(1);
    expect(readdirSync(it.folder)).toEqual(["l"]);
    expect(readdirSync(it.root).sort()).toEqual([".reprise", "r"]);
  });

  test("to where nothing is yet", async () => {
    await using it = await setSync({ "a/b": "1", "e/": "" }, {});
    rmSync(it.to, { recursive: true });
    const run = await it.sync("--delete", "--dry-run");
    expect(run).toMatchObject({ status: 0, errors: "" });
    expect(existsSync(it.to)).toBe(false);
    expect((await it.sync("--delete")).status).toBe(0);
    expect(treeOf(it.to)).toEqual(treeOf(it.from));
  });
});

/** Root reads everything, unless it has no such capability. */
const AS_ANYONE =
  process.getuid?.() === 0 ? ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"] : [];
const canDrop = AS_ANYONE.length === 0 || Bun.which("setpriv") !== null;
if (!canDrop) console.log("skipped: the test of a folder that cannot be read needs setpriv, where root runs it");

test.skipIf(!canDrop)("a folder that the server may not read: status 4, and --delete removes nothing", async () => {
  using root = makeRoot({ "keep/a": "1", "secret/b": "2" });
  await using server = await startServer(root.path, { runBy: AS_ANYONE });
  using folder = temporaryFolder();
  const local = join(folder.path, "l");
  expect((await runClient(server.address, ["sync", "/", local])).status).toBe(0);
  writeTree(local, { extra: "3" });
  const before = treeOf(local);
  chmodSync(join(root.path, "secret"), 0o000);
  const run = await runClient(server.address, ["sync", "--delete", "/", local]);
  chmodSync(join(root.path, "secret"), 0o755);
  expect(run.status).toBe(4);
  expect(treeOf(local)).toEqual(before);
});

test("sync leaves local transfers that are not finished alone, in either direction", async () => {
  await using it = await setUp({ "r/x": "1" });
  const unfinished = { "y.part": "2", "y.resume.json": "{}", "old/z.part": "3", "old/z.resume.json": "{}" };
  writeTree(it.local("l"), { x: "1", gone: "4", ...unfinished });
  expect((await it.run("sync", "--delete", "r", "l")).status).toBe(0);
  expect(existsSync(it.local("l/gone"))).toBe(false);
  for (const path of Object.keys(unfinished)) expect([path, existsSync(it.local(`l/${path}`))]).toEqual([path, true]);
  expect((await it.run("sync", "--up", "--delete", "r", "l")).status).toBe(0);
  expect(treeOf(it.remote("r")).filter((line) => /part|resume/.test(line))).toEqual([]);
});

test("what an earlier get left beside a file that is whole goes with the next run", async () => {
  await using it = await setUp({ "d/big": randomBytes(MIB) });
  expect((await it.run("get", "-r", "d", "-d", ".")).status).toBe(0);
  // As after a kill between the rename of the part and the removal of its log.
  const { mtimeMs, size } = statSync(it.local("d/big"));
  writeFileSync(
    it.local("d/big.resume.json"),
    JSON.stringify({
      command: "get",
      path: "d/big",
      server: it.server.address,
      etag: "x",
      size,
      mtime: Math.floor(mtimeMs * 1000),
      bytes: size,
      crc32: 0,
    }),
  );
  expect((await it.run("get", "-r", "d", "-d", ".")).status).toBe(0);
  expect(readdirSync(it.local("d"))).toEqual(["big"]);
});

// ---------------------------------------------------------------------------------------------------- promise

/** Seeded, so that a failure can be had again. */
function randomFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2_147_483_648;
    return state / 2_147_483_648;
  };
}

describe("20 folders, with kill -9 of client, worker or parent at random points", () => {
  const tree = {
    ...small(150, "a/"),
    ...small(75, "b/c/"),
    ...small(75, "b/d e/f/"),
    "a/big": randomBytes(3 * MIB, 21),
    "b/big": randomBytes(2 * MIB, 22),
    "e/": "",
  };

  test.each(directions)("%s: the tree is whole in the end, and nothing else is there", async (direction, flags) => {
    using root = makeRoot({});
    using folder = temporaryFolder();
    const random = randomFrom(direction === "down" ? 20_240_501 : 20_240_502);
    const args = ["--writable", "--limit-rate", "12M"];
    let server: Server = await startServer(root.path, { args });
    const { port } = server;
    const [from, to] = direction === "down" ? [root.path, folder.path] : [folder.path, root.path];
    writeTree(join(from, "t"), tree);
    const wanted = treeOf(join(from, "t"));
    try {
      for (let round = 0; round < 10; round++) {
        const words = direction === "down" ? ["t", `t${round}`] : [`t${round}`, "t"];
        const start = () => spawnClient(server.address, ["sync", ...flags, ...words], { cwd: folder.path });
        let client = start();
        const victim = ["client", "worker", "parent"][Math.floor(random() * 3)];
        const target = join(to, `t${round}`);
        const point = Math.floor(random() * 310);
        await waitFor("the point is reached", () => client.exitCode !== null || namesBelow(target).length >= point);
        if (victim === "client") {
          client.kill("SIGKILL");
          await client.exited;
          client = start();
        } else if (victim === "worker") {
          server
            .workers()
            .slice(0, 1 + Math.floor(random() * 2))
            .forEach(killHard);
        } else {
          const workers = server.workers();
          await server.stop("SIGKILL");
          await waitFor("its workers are gone", () => workers.every((pid) => !isAlive(pid)));
          server = await startServer(root.path, { port, args });
        }
        const status = await client.exited;
        if (status !== 0)
          throw new Error(`Round ${round}, ${victim} killed: ${await new Response(client.stderr).text()}`);
        expect([round, treeOf(target)]).toEqual([round, wanted]);
        rmSync(target, { recursive: true });
      }
      await waitFor("the server has tidied up", () => temporaries(root.path).length === 0);
      expect(temporaries(folder.path)).toEqual([]);
    } finally {
      await server[Symbol.asyncDispose]();
    }
  });
});

// ---------------------------------------------------------------------------------------------------- patterns

describe("patterns", () => {
  const files: Files = {
    "a.png": "1",
    "b.png": "2",
    "c.txt": "3",
    "a1.txt": "4",
    "a2.txt": "5",
    "*.txt": "literal",
    "x/2024/may": "6",
    "x/2024/june": "7",
    "y/z/2024/july": "8",
    "x/2023/may": "9",
    "x/b.png": "10",
  };

  test("are matched on the server's list, and a name that is there is meant as it is", async () => {
    await using it = await setUp(files);
    const cases: [string, string[]][] = [
      ["*.png", ["a.png", "b.png"]],
      ["**/2024/*", ["july", "june", "may"]],
      ["a{1,2}.txt", ["a1.txt", "a2.txt"]],
      ["*.txt", ["*.txt"]],
      ["[bc].*", ["b.png", "c.txt"]],
      ["?.txt", ["*.txt", "c.txt"]],
      ["x/*.png", ["b.png"]],
      ["x/20*/m*", []],
      ["{x,y/z}/2024/j*", ["july", "june"]],
      ["y/**", []],
    ];
    for (const [index, [pattern, names]] of cases.entries()) {
      const run = await it.run("get", pattern, "-d", `d${index}`);
      if (pattern === "x/20*/m*")
        expect([run.status, run.errors]).toEqual([2, expect.stringContaining("would both be written")]);
      else if (pattern === "y/**") expect(readdirSync(it.local(`d${index}`))).toEqual(["july"]);
      else expect([pattern, run.status, readdirSync(it.local(`d${index}`)).sort()]).toEqual([pattern, 0, names]);
      if (names.length === 0 && pattern !== "y/**") expect(existsSync(it.local(`d${index}`))).toBe(false);
    }
    expect(readFileSync(it.local("d3/*.txt"), "utf8")).toBe("literal");
  });

  test("that match nothing are not found, for every command", async () => {
    await using it = await setUp(files);
    for (const command of ["get", "cat", "rm", "ls"]) {
      const run = await it.run(command, "*.jpg");
      expect([command, run.status, run.errors]).toEqual([command, 3, 'error: not found: nothing matches "*.jpg"\n']);
    }
  });

  test("cat joins what matches in order, ls lists it, rm removes it and nothing else", async () => {
    await using it = await setUp(files);
    expect(await it.run("cat", "a[12].txt", "*.png")).toMatchObject({ status: 0, output: "4512", errors: "" });
    expect((await it.run("ls", "**/2024/*")).output).toBe("x/2024/june\nx/2024/may\ny/z/2024/july\n");
    expect(lines((await it.run("ls", "a?.txt", "--json")).output).map((line) => Object.keys(JSON.parse(line)))).toEqual(
      [
        ["path", "type", "size", "mtime"],
        ["path", "type", "size", "mtime"],
      ],
    );
    expect(await it.run("rm", "**/2024/*", "a*.png")).toMatchObject({ status: 0, output: "", errors: "" });
    expect(treeOf(it.root).map((line) => line.split(" ")[0]!)).toEqual(
      [
        "*.txt",
        "a1.txt",
        "a2.txt",
        "b.png",
        "c.txt",
        "x",
        "x/2023",
        "x/2023/may",
        "x/2024",
        "x/b.png",
        "y",
        "y/z",
        "y/z/2024",
      ].sort(),
    );
    expect(await it.run("rm", "*.txt")).toMatchObject({ status: 0 });
    expect(existsSync(it.remote("*.txt"))).toBe(false);
    expect(existsSync(it.remote("c.txt"))).toBe(true);
  });
});

// ---------------------------------------------------------------------------------------------------- rate

test("--limit-rate holds for all connections together", async () => {
  await using it = await setUp(Object.fromEntries([1, 2, 3, 4].map((seed) => [`d/${seed}`, randomBytes(MIB, seed)])));
  const startedAt = performance.now();
  expect((await it.run("get", "-r", "d", "--limit-rate", "4M", "--jobs", "4")).status).toBe(0);
  expect(performance.now() - startedAt).toBeGreaterThan(950);
});

test("--limit-rate holds for small files, which come in one frame each", async () => {
  const content = randomBytes(50_000);
  await using it = await setUp(Object.fromEntries(Array.from({ length: 40 }, (_, index) => [`d/${index}`, content])));
  const startedAt = performance.now();
  expect((await it.run("get", "-r", "d", "--limit-rate", "2M")).status).toBe(0);
  expect(performance.now() - startedAt).toBeGreaterThan(950);
});
