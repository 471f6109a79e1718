/** `bun test` in a fresh clone: brings what bun.lock names, once. */
import { existsSync } from "node:fs";
import { join } from "node:path";

const home = join(import.meta.dir, "..");
if (!existsSync(join(home, "node_modules", "consola"))) {
  const { exitCode, stderr } = Bun.spawnSync([process.execPath, "install", "--frozen-lockfile"], { cwd: home });
  if (exitCode !== 0) throw new Error(`bun install failed: ${stderr}`);
}
